//go:build linux

package names_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/agent/names"
	"github.com/vmrt/vmrt/pkg/dial"
	"github.com/vmrt/vmrt/pkg/relay"
)

// patience bounds what a test waits for; nothing waits that long when it works.
const patience = 20 * time.Second

// listenBoth listens at a port of loopback that is free for both.
func listenBoth(t *testing.T) (net.PacketConn, net.Listener) {
	t.Helper()
	for attempt := 1; ; attempt++ {
		udp, err := net.ListenPacket("udp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		tcp, err := net.Listen("tcp4", udp.LocalAddr().String())
		if err == nil {
			t.Cleanup(func() { udp.Close() })
			t.Cleanup(func() { tcp.Close() })
			return udp, tcp
		}
		udp.Close() // by TCP the port is somebody else's
		if attempt == 100 {
			t.Fatal(err)
		}
	}
}

// resolver answers what it is asked with the same in upper case, by UDP and
// TCP, as a name server of the host.
func resolver(t *testing.T) netip.AddrPort {
	t.Helper()
	udp, tcp := listenBoth(t)
	go func() {
		b := make([]byte, api.MaxDatagram)
		for {
			n, from, err := udp.ReadFrom(b)
			if err != nil {
				return
			}
			if !bytes.Equal(b[:n], []byte("silence")) {
				udp.WriteTo(bytes.ToUpper(b[:n]), from)
			}
		}
	}()
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			b, _ := io.ReadAll(c)
			c.Write(bytes.ToUpper(b))
			c.Close()
		}
	}()
	return udp.LocalAddr().(*net.UDPAddr).AddrPort()
}

// host is a dial server as the shim has one, which reaches the resolver in
// place of what was asked for.
type host struct {
	listener net.Listener
	resolver netip.AddrPort
	dials    atomic.Int32
}

func newHost(t *testing.T, to netip.AddrPort) *host {
	t.Helper()
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go dial.NewServer(dial.Limits()).Serve(l)
	return &host{listener: l, resolver: to}
}

func (h *host) dial(ctx context.Context, network string, _ netip.AddrPort) (relay.Conn, error) {
	h.dials.Add(1)
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", h.listener.Addr().String())
	if err != nil {
		return nil, err
	}
	if err := dial.Request(ctx, c, network, h.resolver); err != nil {
		c.Close()
		return nil, err
	}
	return c.(*net.UnixConn), nil
}

// freePort is one at which nothing listens at 127.0.0.11.
func freePort(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.11:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

func TestServe(t *testing.T) {
	h := newHost(t, resolver(t))
	port := freePort(t)
	s := names.New(names.Config{Dial: h.dial, Queries: 4, Timeout: patience, Port: port})
	addr := netip.MustParseAddr("127.0.0.11")
	for range 2 { // it is idempotent
		if err := s.Serve(addr); err != nil {
			t.Fatal(err)
		}
	}
	at := netip.AddrPortFrom(addr, port).String()
	for _, network := range []string{"udp4", "tcp4"} {
		for _, question := range []string{"name", string(bytes.Repeat([]byte("x"), 4000))} {
			c, err := net.Dial(network, at)
			if err != nil {
				t.Fatal(err)
			}
			c.SetDeadline(time.Now().Add(patience))
			io.WriteString(c, question)
			least := 1 // a datagram comes whole
			if tcp, ok := c.(*net.TCPConn); ok {
				tcp.CloseWrite()
				least = len(question)
			}
			b := make([]byte, api.MaxDatagram)
			n, err := io.ReadAtLeast(c, b, least)
			if want := bytes.ToUpper([]byte(question)); !bytes.Equal(b[:n], want) {
				t.Errorf("%s: answer of %d bytes, %v; want %d in upper case", network, n, err, len(want))
			}
			c.Close()
		}
	}
}

// Queries that nobody answers hold up no others until there are too many.
func TestSilence(t *testing.T) {
	h := newHost(t, resolver(t))
	port := freePort(t)
	s := names.New(names.Config{Dial: h.dial, Queries: 2, Timeout: 500 * time.Millisecond, Port: port})
	addr := netip.MustParseAddr("127.0.0.11")
	if err := s.Serve(addr); err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("udp4", netip.AddrPortFrom(addr, port).String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "silence")
	io.WriteString(c, "silence")
	// Once the two have been given up, others are answered again.
	answered := make(chan struct{})
	go func() {
		b := make([]byte, 16)
		if n, err := c.Read(b); err == nil && string(b[:n]) == "NAME" {
			close(answered)
		}
	}()
	for deadline := time.After(patience); ; {
		io.WriteString(c, "name")
		select {
		case <-answered:
			return
		case <-time.After(100 * time.Millisecond):
		case <-deadline:
			t.Fatal("no query is answered after two that were not")
		}
	}
}

func TestRefused(t *testing.T) {
	s := names.New(names.Config{Queries: 1, Timeout: patience, Port: freePort(t)})
	for _, addr := range []string{"192.0.2.1", "::1", "0.0.0.0"} {
		if err := s.Serve(netip.MustParseAddr(addr)); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("Serve(%s) = %v; want an invalid argument", addr, err)
		}
	}
	for i := range byte(api.MaxNameServers + 1) {
		err := s.Serve(netip.AddrFrom4([4]byte{127, 0, 1, 1 + i}))
		if full := i == api.MaxNameServers; errors.Is(err, errdefs.ErrResourceExhausted) != full || !full && err != nil {
			t.Errorf("Serve of address %d = %v; want the limit of %d kept", i+1, err, api.MaxNameServers)
		}
	}
}
