// Command loopback serves TCP addresses for tests: each echoes, or resets its
// connections after the first byte, or reports how they end, a line for each:
// "end" or "reset". It says "ready" once all of them listen.
//
//	loopback echo|reset|report ADDRESS...
package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
)

func main() {
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "loopback:", err)
		os.Exit(1)
	}
}

func run(mode string, addresses []string) error {
	serve := map[string]func(*net.TCPConn){"echo": echo, "reset": reset, "report": report}[mode]
	failed := make(chan error)
	for _, a := range addresses {
		l, err := net.Listen("tcp", a)
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					failed <- err
					return
				}
				go serve(c.(*net.TCPConn))
			}
		}()
	}
	fmt.Println("ready")
	return <-failed
}

func echo(c *net.TCPConn) {
	io.Copy(c, c)
	c.Close()
}

func report(c *net.TCPConn) {
	_, err := io.Copy(io.Discard, c)
	switch {
	case err == nil:
		fmt.Println("end")
	case errors.Is(err, syscall.ECONNRESET):
		fmt.Println("reset")
	default:
		fmt.Println(err)
	}
	c.Close()
}

func reset(c *net.TCPConn) {
	io.ReadFull(c, make([]byte, 1))
	c.SetLinger(0)
	c.Close()
}
