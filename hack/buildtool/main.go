// Command buildtool builds pinned programs of other projects and prints the
// folders that hold them, one for each name:
//
//	go run ./hack/buildtool containerd runc
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/vmrt/vmrt/hack/tools"
)

func main() {
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), "usage: buildtool NAME...\n\n")
		for _, t := range tools.All {
			fmt.Fprintf(flag.CommandLine.Output(), "  %-16s%s\n", t.Name, t.Doc)
		}
	}
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	for _, name := range flag.Args() {
		dir, err := tools.Build(ctx, name, os.Stderr)
		if err != nil {
			fmt.Fprintln(os.Stderr, "buildtool:", err)
			os.Exit(1)
		}
		fmt.Println(dir)
	}
}
