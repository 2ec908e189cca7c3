package sandbox

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/containerd/log"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/config"
	"github.com/vmrt/vmrt/pkg/dial"
	"github.com/vmrt/vmrt/pkg/guestdial"
	"github.com/vmrt/vmrt/pkg/hostnet"
	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/listening"
	"github.com/vmrt/vmrt/pkg/portmirror"
	"github.com/vmrt/vmrt/pkg/relay"
	"github.com/vmrt/vmrt/pkg/vsock"
)

// hostNetNS is the path of the host's network namespace: the one in which
// containerd, and so this process, runs.
const hostNetNS = "/proc/self/ns/net"

// hostNetwork is how a pod has the host's network: out through passt, in
// through what listens in the guest.
type hostNetwork struct {
	template *hostnet.Template
	binary   string         // of passt
	passt    *hostnet.Passt // nil until open, and where there is no interface

	ports *portmirror.Mirror // nil until mirror
	// stop ends what mirror has started, and stopped is closed when it has.
	stop    context.CancelFunc
	stopped chan struct{}
}

// newHostNetwork finds out what the host's network is and whether the pod can
// have it. Nothing has to be undone.
func newHostNetwork(settings *config.Config) (*hostNetwork, error) {
	// This process is in the host's network namespace.
	t, err := hostnet.Find()
	if err != nil {
		return nil, err
	}
	h := &hostNetwork{template: t}
	if t.Interface == "" {
		return h, nil
	}
	if h.binary, err = settings.FindPasst(); err != nil {
		return nil, fmt.Errorf("%w: %w", hostnet.ErrNoPasst, err)
	}
	return h, nil
}

// open starts passt. A host without any interface but loopback needs none.
func (h *hostNetwork) open(ctx context.Context, s *Sandbox) (err error) {
	logger := log.G(ctx).WithField("sandbox", s.cfg.ID)
	if h.template.Interface == "" {
		logger.Warn("the host's network is its loopback interface alone, and so is the pod's")
		return nil
	}
	h.passt, err = hostnet.StartPasst(ctx, s.ns, hostnet.PasstConfig{
		Binary: h.binary, Credential: credential(s.cfg.Namespace, s.cfg.ID), Template: h.template,
	})
	return err
}

func (h *hostNetwork) nics() []hypervisor.NIC {
	if h.passt == nil {
		return nil
	}
	return []hypervisor.NIC{h.passt.NIC()}
}

func (h *hostNetwork) releaseNICs() {
	if h.passt != nil {
		h.passt.ReleaseFile()
	}
}

// done is closed when the pod has lost the host's network.
func (h *hostNetwork) done() <-chan struct{} {
	if h == nil || h.passt == nil {
		return nil
	}
	return h.passt.Done()
}

// Bounds of the connections between host and guest, which share the guest's
// vsock device with its streams.
const (
	maxGuestConns    = 512 // to ports of the guest
	maxHostConns     = 256 // to ports of the host
	guestDialTimeout = 20 * time.Second
)

// mirror has host and guest see each other's listening ports, and returns once
// the guest sees those of the host.
func (h *hostNetwork) mirror(ctx context.Context, s *Sandbox) error {
	logger := log.G(ctx).WithField("sandbox", s.cfg.ID)
	h.ports = portmirror.New(portmirror.Config{
		First: true, MaxConns: maxGuestConns, DialTimeout: guestDialTimeout,
		Dial: func(ctx context.Context, to netip.AddrPort) (relay.Conn, error) {
			return guestdial.DialAddr(ctx, s.transport, h.guestAddress(to))
		},
		Failed: func(socket listening.Socket, err error) {
			logger.WithError(err).Warnf("a process of the pod listens at %s and cannot be reached there from the host", socket)
		},
	})
	// Not of the boot: it goes on.
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	h.stop, h.stopped = stop, make(chan struct{})
	stream, err := s.Agent().MirrorPorts(run)
	if err != nil {
		close(h.stopped)
		return wrap("mirror ports of guest", err)
	}
	limits := dial.Limits()
	limits.Conns, limits.Allow = maxHostConns, h.allow
	go func() { _ = dial.NewServer(limits).Serve(accepting{ctx: run, transport: s.transport}) }()

	ready := make(chan struct{})
	failed := make(chan error, 1)
	go func() {
		defer close(h.stopped)
		err := h.ports.Run(run, stream, func() { close(ready) })
		failed <- err
		if run.Err() == nil && alive(s) {
			logger.WithError(err).Error("the pod's ports are not mirrored any more")
		}
	}()
	select {
	case <-ready:
		return nil
	case err := <-failed:
		return wrap("mirror ports of guest", err)
	case <-ctx.Done():
		return fmt.Errorf("mirror ports of guest: %w", context.Cause(ctx))
	}
}

func alive(s *Sandbox) bool {
	select {
	case <-s.dead:
		return false
	default:
		return true
	}
}

// guestAddress returns what the guest calls an address of the host. Of the
// host's addresses it has the template's alone; the others would lead back here.
func (h *hostNetwork) guestAddress(to netip.AddrPort) netip.AddrPort {
	ip, port := to.Addr(), to.Port()
	switch t := h.template; {
	case t.Has(ip):
		return to
	case ip.Is4() && t.IPv4.IsValid():
		return netip.AddrPortFrom(t.IPv4.Addr(), port)
	case ip.Is4():
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
	case t.IPv6.IsValid():
		return netip.AddrPortFrom(t.IPv6.Addr(), port)
	}
	return netip.AddrPortFrom(netip.IPv6Loopback(), port)
}

// allow returns an error unless the guest was told that something listens at
// the address.
func (h *hostNetwork) allow(network string, to netip.AddrPort) error {
	if network != api.TCP || !h.template.Has(to.Addr()) || !h.ports.Offers(to) {
		return fmt.Errorf("nothing at %s by %s was offered", to, network)
	}
	return nil
}

// accepting is the guest's connections to the host as a listener, until ctx
// ends.
type accepting struct {
	ctx       context.Context
	transport vsock.Transport
}

func (a accepting) Accept() (net.Conn, error) {
	c, err := a.transport.Accept(a.ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", net.ErrClosed, err)
	}
	return c, nil
}

// Close does nothing: the transport is the sandbox's.
func (accepting) Close() error { return nil }

// Addr is of no use to anybody.
func (accepting) Addr() net.Addr { return &net.UnixAddr{Net: "vsock"} }

// close ends passt and closes the ports. The virtual machine has ended.
func (h *hostNetwork) close() {
	if h.stop != nil {
		h.stop()
		<-h.stopped
	}
	if h.passt != nil {
		h.passt.Close()
	}
}
