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
	"github.com/vmrt/vmrt/pkg/dial"
	"github.com/vmrt/vmrt/pkg/listening"
	"github.com/vmrt/vmrt/pkg/portmirror"
	"github.com/vmrt/vmrt/pkg/relay"
)

// Bounds of connections to the host's ports.
const (
	maxHostConns    = 256
	hostDialTimeout = 15 * time.Second
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
		Dial: s.dialHostPort, MaxConns: maxHostConns, DialTimeout: hostDialTimeout,
		Failed: func(s listening.Socket, err error) {
			log.L.WithError(err).Debugf("the host's port at %s is not reached from here", s)
		},
	}).Run(ctx, stream, func() {})
	if errors.Is(err, context.Canceled) {
		return nil // the connection has gone; nobody hears of it
	}
	return errgrpc.ToGRPC(fmt.Errorf("mirror ports: %w", err))
}

// dialHostPort connects to a TCP port of the host.
func (s *service) dialHostPort(ctx context.Context, to netip.AddrPort) (relay.Conn, error) {
	conn, err := vsock.Dial(vsock.Host, s.hostPort, nil)
	if err == nil {
		if err = dial.Request(ctx, conn, to); err == nil {
			return conn, nil
		}
		conn.Close()
	}
	return nil, fmt.Errorf("dial the host's %s: %w", to, err)
}
