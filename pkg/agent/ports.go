package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime/debug"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/mdlayher/vsock"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/agent/names"
	"github.com/vmrt/vmrt/pkg/dial"
	"github.com/vmrt/vmrt/pkg/listening"
	"github.com/vmrt/vmrt/pkg/portmirror"
	"github.com/vmrt/vmrt/pkg/relay"
)

// Bounds of connections to the host's ports.
const (
	maxHostConns    = 256
	hostDialTimeout = 15 * time.Second
	// maxQueries is how many names are asked for at once.
	maxQueries = 128
)

// MirrorPorts runs until the host ends it.
func (s *service) MirrorPorts(ctx context.Context, stream api.Agent_MirrorPortsServer) (err error) {
	defer func() {
		if v := recover(); v != nil {
			log.L.Errorf("mirror ports: panic: %v\n%s", v, debug.Stack())
			err = fmt.Errorf("mirror ports: panic: %v", v)
		}
	}()
	if !s.mirrorMu.TryLock() {
		return errgrpc.ToGRPC(fmt.Errorf("mirror ports: it is being done already: %w", errdefs.ErrFailedPrecondition))
	}
	defer s.mirrorMu.Unlock()
	select {
	case <-s.booted: // with what lists sockets
	case <-ctx.Done():
		return errgrpc.ToGRPC(ctx.Err())
	}
	err = portmirror.New(portmirror.Config{
		Dial: func(ctx context.Context, to netip.AddrPort) (relay.Conn, error) {
			return dialHostPort(ctx, s.hostPort, api.TCP, to)
		},
		MaxConns: maxHostConns, DialTimeout: hostDialTimeout,
		Failed: func(s listening.Socket, err error) {
			log.L.WithError(err).Debugf("the host's port at %s is not reached from here", s)
		},
	}).Run(ctx, stream, func() {})
	if errors.Is(err, context.Canceled) {
		return nil // the connection has gone; nobody hears of it
	}
	return errgrpc.ToGRPC(fmt.Errorf("mirror ports: %w", err))
}

// newNames returns what answers for name servers of the host, where the host
// listens at the vsock port.
func newNames(hostPort uint32) *names.Server {
	return names.New(names.Config{
		Dial: func(ctx context.Context, network string, to netip.AddrPort) (relay.Conn, error) {
			return dialHostPort(ctx, hostPort, network, to)
		},
		Queries: maxQueries, Timeout: hostDialTimeout, Port: api.PortNames,
	})
}

func (s *service) ServeNames(ctx context.Context, r *api.NameServers) (*api.Empty, error) {
	select {
	case <-s.booted: // with the loopback interface
	case <-ctx.Done():
		return done(ctx.Err())
	}
	for _, text := range r.GetAddresses() {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return done(fmt.Errorf("serve names at %q: want an IP address: %w", text, errdefs.ErrInvalidArgument))
		}
		if err := s.names.Serve(addr); err != nil {
			return done(err)
		}
	}
	return done(nil)
}

// dialHostPort connects to a port of the host.
func dialHostPort(ctx context.Context, hostPort uint32, network string, to netip.AddrPort) (relay.Conn, error) {
	conn, err := vsock.Dial(vsock.Host, hostPort, nil)
	if err == nil {
		if err = dial.Request(ctx, conn, network, to); err == nil {
			return conn, nil
		}
		conn.Close()
	}
	return nil, fmt.Errorf("dial the host's %s by %s: %w", to, network, err)
}
