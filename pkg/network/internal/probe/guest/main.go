//go:build linux

// Command guest is the probe in a container of a virtual machine.
package main

import (
	"fmt"
	"net/rpc"
	"os"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/tests/probe"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run() error {
	if err := rpc.Register(&probe.Probe{}); err != nil {
		return err
	}
	l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, probe.Port, nil)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go rpc.ServeConn(c)
	}
}
