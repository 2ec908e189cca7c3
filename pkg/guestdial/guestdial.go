//go:build linux

// Package guestdial is the host's side of a connection to a TCP port on the
// guest's loopback: it asks the agent for it (see api.PortDial) and hands over
// the connection that the agent then relays.
//
// The guest is not trusted: its answer is bounded in size by the protocol and
// in time by the caller's context, and the bytes that follow are its own.
package guestdial

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/vsock"
)

// Timeout bounds a dial whose context has no deadline that is earlier.
const Timeout = 15 * time.Second

// Guest is a virtual machine's vsock; vsock.Transport is one.
type Guest interface {
	Dial(ctx context.Context, port uint32) (vsock.Conn, error)
}

// Dial connects to a port of the guest's loopback: at 127.0.0.1 if network is
// "tcp4", at ::1 if it is "tcp6". The error is syscall.ECONNREFUSED if nobody
// listens there. The end of ctx ends the dial, not the connection.
func Dial(ctx context.Context, guest Guest, network string, port uint16) (vsock.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	conn, err := guest.Dial(ctx, api.PortDial)
	if err == nil {
		err = request(ctx, conn, network, port)
	} else {
		// Not the refusal that a caller asks for: the agent itself is away.
		err = fmt.Errorf("reach the agent: %v", err)
	}
	if err != nil {
		if conn != nil {
			conn.Close()
		}
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
			err = fmt.Errorf("%w: %w", cause, err)
		}
		return nil, fmt.Errorf("dial guest %s port %d: %w", network, port, err)
	}
	return conn, nil
}

// request has the agent connect. Whatever ends ctx ends the wait.
func request(ctx context.Context, conn vsock.Conn, network string, port uint16) error {
	expired := time.Unix(1, 0)
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		conn.SetDeadline(expired)
		close(interrupted)
	})
	err := api.WriteDialRequest(conn, network, port)
	if err == nil {
		err = api.ReadDialAnswer(conn)
	}
	if !stop() {
		<-interrupted // the deadline is not the connection's from here on
		if err == nil {
			err = context.Cause(ctx)
		}
	}
	return err
}
