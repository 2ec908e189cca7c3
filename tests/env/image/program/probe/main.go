// Command probe is an end of a network: a server, or a client that checks and
// measures (package probe).
//
//	probe serve ADDRESS
//	probe check ADDRESS                            makes every exchange of checks
//	probe roundtrip tcp|udp ADDRESS BYTES COUNT    prints the median in ns
//	probe fill ADDRESS BYTES                       prints how long it took in ns
package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/vmrt/vmrt/tests/probe"
)

// checks are what goes wrong first on a network: messages of one segment and of
// many, datagrams of one frame, of several, and of the largest size.
var checks = []probe.Exchange{
	{Network: "tcp", Size: 1}, {Network: "tcp", Size: 100_000},
	{Network: "udp", Size: 1}, {Network: "udp", Size: 1472}, {Network: "udp", Size: 65507},
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	var p probe.Probe
	if len(args) < 2 {
		return errors.New("want a command and an address")
	}
	switch args[0] {
	case "serve":
		if err := p.Serve(args[1], nil); err != nil {
			return err
		}
		fmt.Println("serving")
		select {}
	case "check":
		var errs []error
		for _, x := range checks {
			x.Addr, x.Count = args[1], 3
			var median time.Duration
			errs = append(errs, p.RoundTrips(x, &median))
		}
		return errors.Join(errs...)
	case "roundtrip":
		sizes, err := numbers(args[min(3, len(args)):], 2)
		if err != nil {
			return err
		}
		var median time.Duration
		err = p.RoundTrips(probe.Exchange{Network: args[1], Addr: args[2], Size: sizes[0], Count: sizes[1]}, &median)
		fmt.Println(median.Nanoseconds())
		return err
	case "fill":
		sizes, err := numbers(args[2:], 1)
		if err != nil {
			return err
		}
		begin := time.Now()
		err = p.Fill(probe.Transfer{Addr: args[1], Bytes: int64(sizes[0])}, nil)
		fmt.Println(time.Since(begin).Nanoseconds())
		return err
	}
	return fmt.Errorf("no command %q", args[0])
}

func numbers(args []string, want int) (all []int, err error) {
	if len(args) != want {
		return nil, fmt.Errorf("%d numbers: want %d", len(args), want)
	}
	for _, a := range args {
		n, convErr := strconv.Atoi(a)
		err = errors.Join(err, convErr)
		all = append(all, n)
	}
	return all, err
}
