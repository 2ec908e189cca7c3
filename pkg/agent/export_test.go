package agent

import (
	"net"
	"os"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/idmap"
)

// Serve serves what PID 1 serves, on other sockets. For tests that stand in
// for the machine.
func Serve(rpc, streams, dials net.Listener, powerOff func()) error {
	reap()
	if err := os.MkdirAll(api.GuestRun, 0o711); err != nil {
		return err
	}
	booted := make(chan struct{})
	close(booted)
	a, err := newAgent(0, idmap.Mapping{}, nil, booted, powerOff)
	if err != nil {
		return err
	}
	return <-a.serve(rpc, streams, dials)
}
