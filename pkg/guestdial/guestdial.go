//go:build linux

// Package guestdial is the host's side of a connection to a TCP port of the
// guest: it asks the agent for it (see api.PortDial) and hands over
// the connection that the agent then relays.
//
// The guest is not trusted: its answer is bounded in size by the protocol and
// in time by the caller's context, and the bytes that follow are its own.
package guestdial

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/dial"
	"github.com/vmrt/vmrt/pkg/vsock"
)

// Timeout bounds a dial whose context has no deadline that is earlier.
const Timeout = 15 * time.Second

// Guest is a virtual machine's vsock; vsock.Transport is one.
type Guest interface {
	Dial(ctx context.Context, port uint32) (vsock.Conn, error)
}

// Dial connects to a port of the guest's loopback: at 127.0.0.1 if network is
// "tcp4", at ::1 if it is "tcp6". Otherwise it is DialAddr.
func Dial(ctx context.Context, guest Guest, network string, port uint16) (vsock.Conn, error) {
	switch network {
	case "tcp4":
		return DialAddr(ctx, guest, netip.AddrPortFrom(loopback4, port))
	case "tcp6":
		return DialAddr(ctx, guest, netip.AddrPortFrom(netip.IPv6Loopback(), port))
	}
	return nil, fmt.Errorf("dial guest by network %q: want tcp4 or tcp6", network)
}

var loopback4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// DialAddr connects to an address as the guest knows it. The error is
// syscall.ECONNREFUSED if nobody listens there. The end of ctx ends the dial,
// not the connection.
func DialAddr(ctx context.Context, guest Guest, to netip.AddrPort) (vsock.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	conn, err := guest.Dial(ctx, api.PortDial)
	if err == nil {
		err = dial.Request(ctx, conn, api.TCP, to)
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
		return nil, fmt.Errorf("dial guest %s: %w", to, err)
	}
	return conn, nil
}
