//go:build linux

// Package portforward makes the TCP ports on a guest's loopback reachable on
// the loopback of its pod's network namespace on the host. That is where
// container managers look for them: containerd's CRI plugin serves a
// port-forward by entering the namespace and dialling localhost, by tcp4 and
// then, if that fails, by tcp6 (internal/cri/server/
// sandbox_portforward_linux.go). With a virtual machine nobody listens there.
//
// Contract. While a Forwarder is open, a TCP connection within the namespace
// from loopback to any port of 127.0.0.0/8 or ::1 is accepted, the guest is
// dialled for the same port, and bytes, the end of either direction and resets
// are relayed (package relay) for as long as both sides like. A program of
// type sk_lookup, attached to the namespace, hands such connections to one
// listener for each address family. Everything ends with Close, or with the
// process, however it ends: nothing is pinned.
//
// Which address of the guest is dialled: for ::1 the guest's ::1; for 127/8,
// whichever address it was, 127.0.0.1 and then, if that fails, ::1. The second
// try is what containerd would do itself if its first dial were refused, which
// it never is.
//
// A refusal by the guest is a reset right after the connection was made, which
// a client notices at its first read, or in connect(2) if it is slow. It cannot
// be a refused connection: the kernel answers the client's SYN for the listener
// before anybody knows of the connection, and an sk_lookup program has to
// choose at once, without the guest. The same goes for a connection above
// MaxConns.
//
// What is left alone: the pod's own addresses, connections of which only one
// end is loopback, UDP, other namespaces, and the ports on which something
// listens in the namespace at Start, at loopback or at any address. The
// process's own namespace, which is the one of pods with the host's network,
// is refused.
//
// Not guaranteed: a socket that starts to listen in the namespace later is
// reached only at other addresses. See package relay for resets.
//
// Linux 5.9, with CAP_BPF and CAP_NET_ADMIN, or CAP_SYS_ADMIN. Elsewhere Start
// returns an error that is ErrNotSupported, and a pod lives well without.
package portforward

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/forward"
	"github.com/vmrt/vmrt/pkg/relay"
)

const (
	// MaxConns is the most connections at once of one Forwarder.
	MaxConns = 512
	// DialTimeout bounds the wait for the guest, both of its addresses
	// together.
	DialTimeout = 20 * time.Second
)

// Conn is a connection to the guest.
type Conn = relay.Conn

// DialFunc connects to a port of the guest's loopback: to 127.0.0.1 if network
// is "tcp4", to ::1 if it is "tcp6". It is called from any goroutine and
// returns soon after ctx has ended.
type DialFunc func(ctx context.Context, network string, port uint16) (Conn, error)

// Pod runs functions in a pod's network namespace; podns.Namespaces is one.
type Pod interface {
	Do(ctx context.Context, f func() error) error
}

// Forwarder serves one pod.
type Forwarder struct {
	dial     DialFunc
	server   *forward.Server
	steering *steering
}

// Start begins to serve the pod. ctx bounds Start alone.
func Start(ctx context.Context, pod Pod, dial DialFunc) (*Forwarder, error) {
	f, err := start(ctx, pod, dial)
	if err != nil {
		return nil, fmt.Errorf("port-forward: %w", err)
	}
	return f, nil
}

func start(ctx context.Context, pod Pod, dial DialFunc) (*Forwarder, error) {
	var ns *namespace
	err := pod.Do(ctx, func() (err error) {
		ns, err = enter()
		return err
	})
	if err != nil {
		return nil, err
	}
	defer ns.file.Close()
	steering, err := steer(ns)
	if err != nil {
		ns.closeListeners()
		return nil, err
	}
	f := &Forwarder{
		dial: dial, steering: steering,
		server: forward.New(forward.Config{Name: "port-forward", MaxConns: MaxConns, DialTimeout: DialTimeout}),
	}
	for _, l := range ns.listeners {
		f.server.Serve(l, f.connect)
	}
	return f, nil
}

// Close stops to take connections, resets those that there are, and returns
// when nothing runs any more and nothing is attached. Idempotent.
func (f *Forwarder) Close() error {
	// First of all, so that what comes from now on finds nobody.
	if err := errors.Join(f.steering.Close(), f.server.Close()); err != nil {
		return fmt.Errorf("close port-forward: %w", err)
	}
	return nil
}

// connect dials the guest.
func (f *Forwarder) connect(ctx context.Context, accepted *net.TCPConn) (relay.Conn, error) {
	local := accepted.LocalAddr().(*net.TCPAddr)
	port := uint16(local.Port)
	if local.IP.To4() == nil {
		return f.dial(ctx, "tcp6", port)
	}
	guest, err := f.dial(ctx, "tcp4", port)
	if err == nil || ctx.Err() != nil {
		return guest, err
	}
	guest, err6 := f.dial(ctx, "tcp6", port)
	if err6 != nil {
		return nil, errors.Join(err, err6)
	}
	return guest, nil
}

// ErrNotSupported is what every UnsupportedError is.
var ErrNotSupported = errors.New("not supported")

// UnsupportedError says why a host cannot forward ports.
type UnsupportedError struct {
	// Missing is what the kernel or the process lacks.
	Missing string
	// Err is how that showed.
	Err error
}

// Error implements error.
func (e *UnsupportedError) Error() string {
	return fmt.Sprintf("not supported here: it needs %s: %v", e.Missing, e.Err)
}

// Is reports whether target is ErrNotSupported.
func (e *UnsupportedError) Is(target error) bool { return target == ErrNotSupported }

// Unwrap returns how it showed.
func (e *UnsupportedError) Unwrap() error { return e.Err }

// unsupported gives err the name of what is missing where its errno tells;
// feature is what the kernel lacks if it does not know it.
func unsupported(err error, feature string) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return &UnsupportedError{"CAP_BPF and CAP_NET_ADMIN", err}
	case errors.Is(err, unix.ENOSYS):
		return &UnsupportedError{"the system call bpf", err}
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.E2BIG), errors.Is(err, unix.EOPNOTSUPP),
		errors.Is(err, unix.ENOENT), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, ebpf.ErrNotSupported):
		return &UnsupportedError{feature, err}
	}
	return err
}
