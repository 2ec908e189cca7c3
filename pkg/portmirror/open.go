//go:build linux

package portmirror

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/listening"
	"github.com/vmrt/vmrt/pkg/relay"
)

// opened is a socket that stands here for one of the other side.
type opened struct {
	listener *net.TCPListener
	// socket is what it is here.
	socket listening.Socket
}

// failure is a socket that cannot be opened here.
type failure struct {
	socket listening.Socket
	err    error
}

// apply closes what is no longer wanted and opens what is. It returns what
// could not be opened and was not reported before. m.mu is held.
func (m *Mirror) apply() (failures []failure) {
	if m.closed {
		return nil
	}
	for s, o := range m.opened {
		if !slices.Contains(m.wanted, s) {
			o.listener.Close() // ends what serves it
			delete(m.opened, s)
		}
	}
	for s := range m.failed {
		if !slices.Contains(m.wanted, s) {
			delete(m.failed, s)
		}
	}
	for _, s := range m.wanted {
		if m.opened[s] != nil {
			continue
		}
		o, err := m.open(s)
		if err == nil {
			m.opened[s] = o
			delete(m.failed, s)
			m.server.Serve(o.listener, func(ctx context.Context, accepted *net.TCPConn) (relay.Conn, error) {
				return m.cfg.Dial(ctx, target(s, accepted))
			})
			continue
		}
		if _, known := m.failed[s]; !known {
			m.failed[s] = struct{}{}
			failures = append(failures, failure{s, err})
		}
	}
	return failures
}

// report must not be called with m.mu held.
func (m *Mirror) report(failures []failure) {
	for _, f := range failures {
		m.cfg.Failed(f.socket, f.err)
	}
}

// target is what a connection to what stands for s is for.
func target(s listening.Socket, accepted *net.TCPConn) netip.AddrPort {
	if !s.Addr.Addr().IsUnspecified() {
		return s.Addr
	}
	local := accepted.LocalAddr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(local.Addr().Unmap().WithZone(""), s.Addr.Port())
}

// open listens at the address of s. Where there is no IPv6, any address of both
// families is any of IPv4.
func (m *Mirror) open(s listening.Socket) (*opened, error) {
	network := "tcp4"
	switch ip := s.Addr.Addr(); {
	case ip.Is6() && ip.IsUnspecified() && !s.V6Only:
		network = "tcp"
	case ip.Is6():
		network = "tcp6"
	}
	l, err := m.listen(network, s.Addr)
	if network == "tcp" && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)) {
		s.Addr = netip.AddrPortFrom(netip.IPv4Unspecified(), s.Addr.Port())
		l, err = m.listen("tcp4", s.Addr)
	}
	if err != nil {
		return nil, err
	}
	return &opened{listener: l, socket: s}, nil
}

func (m *Mirror) listen(network string, addr netip.AddrPort) (l *net.TCPListener, err error) {
	var cfg net.ListenConfig
	cfg.SetMultipathTCP(false) // it is relayed, one hop at a time
	err = m.inside(func() error {
		made, err := cfg.Listen(context.Background(), network, addr.String())
		if err == nil {
			l = made.(*net.TCPListener)
		}
		return err
	})
	return l, err
}

// close ends everything.
func (m *Mirror) close() {
	m.mu.Lock()
	m.closed = true
	for _, o := range m.opened {
		o.listener.Close()
	}
	clear(m.opened)
	m.told = nil
	m.mu.Unlock()
	// Without the lock: it waits for dials.
	_ = m.server.Close()
}

// encode turns sockets into the protocol's form.
func encode(sockets []listening.Socket) *api.ListeningPorts {
	list := &api.ListeningPorts{}
	for _, s := range sockets {
		list.Ports = append(list.Ports, &api.ListeningPort{
			Address: s.Addr.Addr().AsSlice(), Port: uint32(s.Addr.Port()), V6Only: s.V6Only,
		})
	}
	return list
}

// decode is encode undone. What another one would not have written is an error.
func decode(list *api.ListeningPorts) ([]listening.Socket, error) {
	if n := len(list.GetPorts()); n > api.MaxListeningPorts {
		return nil, fmt.Errorf("%d listening sockets: at most %d", n, api.MaxListeningPorts)
	}
	var all []listening.Socket
	for _, p := range list.GetPorts() {
		ip, ok := netip.AddrFromSlice(p.GetAddress())
		if !ok || ip.Is4In6() || p.GetPort() == 0 || p.GetPort() > 65535 {
			return nil, fmt.Errorf("listening socket at %x, port %d: want an IP address and a port", p.GetAddress(), p.GetPort())
		}
		s := listening.Socket{Addr: netip.AddrPortFrom(ip, uint16(p.GetPort())), V6Only: p.GetV6Only() && ip.Is6() && ip.IsUnspecified()}
		if mirrored(s) {
			all = append(all, s)
		}
	}
	slices.SortFunc(all, compare)
	return slices.Compact(all), nil
}
