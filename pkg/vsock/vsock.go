// Package vsock is the host's side of one virtual machine's vsock device. A
// Transport is that device in one of two forms, which a caller does not tell
// apart:
//
//   - vhost: the host kernel's device, /dev/vhost-vsock; connections are
//     AF_VSOCK sockets.
//   - vhost-user: a device that this process serves itself (pkg/vhostuser),
//     for hosts without the kernel's. It needs guest memory that is shared.
//
// A Transport and its connections may be used from any goroutine. Connections
// come from or go to this guest alone. Nothing is promised about when or
// whether the guest answers: every wait is bounded by the caller's context or
// deadline, and every byte received is untrusted.
package vsock

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/vmrt/vmrt/pkg/hypervisor"
)

// Modes for Open.
const (
	Auto      = "auto"
	Vhost     = "vhost"
	VhostUser = "vhost-user"
)

// Transport is the vsock device of one virtual machine that is about to start
// or runs.
type Transport interface {
	// Name is Vhost or VhostUser.
	Name() string
	// CID is the guest's context id.
	CID() uint32
	// HostPort is the port on the host (CID 2) that the guest dials.
	HostPort() uint32
	// Device is what hypervisor.Spec needs. Its file must be closed once the
	// VMM has inherited it: only then does the VMM's end break connections
	// and, with VhostUser, end waits. Close closes it if that has not
	// happened. Every call returns the same file.
	Device() hypervisor.Vsock
	// Dial connects to a port of the guest. Before the guest's driver is
	// ready it waits; a port on which nobody listens is ECONNREFUSED. It
	// returns ctx's error when ctx ends first and net.ErrClosed after Close.
	// With Vhost the end of the VMM does not end it.
	Dial(ctx context.Context, port uint32) (Conn, error)
	// Accept returns the next connection that this guest made to HostPort.
	// It returns ctx's error when ctx ends first and net.ErrClosed after
	// Close. With Vhost the end of the VMM does not end it.
	Accept(ctx context.Context) (Conn, error)
	// Close breaks all connections, ends all waits and frees the device.
	// Idempotent.
	Close() error
}

// Conn is a stream to or from the guest.
type Conn interface {
	net.Conn
	// CloseWrite ends the stream towards the guest, which reads io.EOF after
	// the last byte. Reading goes on.
	CloseWrite() error
}

// Open makes the vsock device for one new virtual machine. Mode Auto is Vhost
// where that works, else VhostUser.
func Open(mode string) (Transport, error) {
	switch mode {
	case Vhost:
		return openVhost()
	case VhostUser:
		return openVhostUser()
	case Auto:
		t, vhostErr := openVhost()
		if vhostErr == nil {
			return t, nil
		}
		t, err := openVhostUser()
		if err != nil {
			return nil, errors.Join(vhostErr, err)
		}
		return t, nil
	}
	return nil, fmt.Errorf("vsock mode %q: want %q, %q or %q", mode, Auto, Vhost, VhostUser)
}
