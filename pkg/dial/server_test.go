//go:build linux

package dial_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/dial"
)

// patience bounds what a test waits for; nothing waits that long when it works.
const patience = 20 * time.Second

// host is the far end of a server.
type host struct {
	t    *testing.T
	addr string
}

func newHost(t *testing.T, cfg dial.Config) *host {
	t.Helper()
	h := &host{t, filepath.Join(t.TempDir(), "s")}
	listener, err := net.Listen("unix", h.addr)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- dial.NewServer(cfg).Serve(listener) }()
	t.Cleanup(func() {
		listener.Close()
		select {
		case err := <-served:
			if err != nil {
				t.Errorf("Serve() = %v; want nil after the listener's close", err)
			}
		case <-time.After(patience):
			t.Error("Serve has not returned although every connection was closed")
		}
	})
	return h
}

// connect dials without a request.
func (h *host) connect() *net.UnixConn {
	h.t.Helper()
	c, err := net.Dial("unix", h.addr)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.UnixConn)
}

// dial asks for a port of loopback.
func (h *host) dial(network string, port int) (*net.UnixConn, error) {
	h.t.Helper()
	ip := netip.MustParseAddr("127.0.0.1")
	if network == "tcp6" {
		ip = netip.IPv6Loopback()
	}
	return h.dialAddr(api.TCP, netip.AddrPortFrom(ip, uint16(port)))
}

func (h *host) dialAddr(network string, to netip.AddrPort) (*net.UnixConn, error) {
	h.t.Helper()
	c := h.connect()
	if err := api.WriteDialRequest(c, network, to); err != nil {
		h.t.Fatal(err)
	}
	return c, api.ReadDialAnswer(c)
}

// listen serves connections to a loopback address and returns the port.
func listen(t *testing.T, network, address string, serve func(*net.TCPConn)) int {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				serve(c.(*net.TCPConn))
				c.Close()
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		running.Wait()
	})
	return l.Addr().(*net.TCPAddr).Port
}

func upper(c *net.TCPConn) {
	b, _ := io.ReadAll(c)
	io.WriteString(c, strings.ToUpper(string(b)))
}

func TestFamilies(t *testing.T) {
	four := listen(t, "tcp4", "127.0.0.1:0", upper)
	six := listen(t, "tcp6", "[::1]:0", upper)
	both := listen(t, "tcp", "[::]:0", upper)
	h := newHost(t, dial.Limits())
	for _, tc := range []struct {
		name, network string
		port          int
		refused       bool
	}{
		{"127.0.0.1", "tcp4", four, false},
		{"::1", "tcp6", six, false},
		{"any by IPv4", "tcp4", both, false},
		{"any by IPv6", "tcp6", both, false},
		{"127.0.0.1 by IPv6", "tcp6", four, true},
		{"::1 by IPv4", "tcp4", six, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := &host{t, h.addr}
			c, err := h.dial(tc.network, tc.port)
			if tc.refused {
				if !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("answer = %v; want refused", err)
				}
				if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
					t.Errorf("read after a refusal = %d, %v; want the end", n, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(c, "question")
			c.CloseWrite()
			if got, err := io.ReadAll(c); string(got) != "QUESTION" || err != nil {
				t.Errorf("answer = %q, %v; want %q", got, err, "QUESTION")
			}
		})
	}
}

// The host gets what the server says first right behind the answer.
func TestServerSpeaksFirst(t *testing.T) {
	port := listen(t, "tcp4", "127.0.0.1:0", func(c *net.TCPConn) { io.WriteString(c, "220 ready") })
	c, err := newHost(t, dial.Limits()).dial("tcp4", port)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); string(got) != "220 ready" || err != nil {
		t.Errorf("read = %q, %v; want %q", got, err, "220 ready")
	}
}

func TestServerResets(t *testing.T) {
	port := listen(t, "tcp4", "127.0.0.1:0", func(c *net.TCPConn) {
		io.ReadFull(c, make([]byte, 1))
		c.SetLinger(0)
	})
	c, err := newHost(t, dial.Limits()).dial("tcp4", port)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(c, "x")
	io.ReadAll(c)
	if _, err := c.Write([]byte("y")); !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("write after the server's reset = %v; want a broken connection", err)
	}
}

func TestHostAbandons(t *testing.T) {
	result := make(chan error, 1)
	port := listen(t, "tcp4", "127.0.0.1:0", func(c *net.TCPConn) {
		_, err := io.ReadAll(c)
		result <- err
	})
	c, err := newHost(t, dial.Limits()).dial("tcp4", port)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := <-result; !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the server's read = %v; want a reset", err)
	}
}

func TestRequestsThatAreNone(t *testing.T) {
	limits := dial.Limits()
	limits.Request = 100 * time.Millisecond
	h := newHost(t, limits)
	for _, s := range []string{"", "\x04", "\x07\x00\x50", "\x04\x00\x00", "GET / HTTP/1.0\r\n\r\n"} {
		c := h.connect()
		io.WriteString(c, s)
		got, err := io.ReadAll(c)
		if len(got) != 0 || err != nil && !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("answer to %q = %q, %v; want the end", s, got, err)
		}
	}
}

// A port whose queue is full takes the connection never.
func TestConnectTimeout(t *testing.T) {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(s)
	if err := errors.Join(unix.Bind(s, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(s, 0)); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(s)
	if err != nil {
		t.Fatal(err)
	}
	limits := dial.Limits()
	limits.Connect = 200 * time.Millisecond
	h := newHost(t, limits)
	for range 3 { // the first ones fit
		_, err = h.dial("tcp4", name.(*unix.SockaddrInet4).Port)
		if err != nil {
			break
		}
	}
	if err == nil || !strings.Contains(err.Error(), "i/o timeout") {
		t.Errorf("answer = %v; want a timeout", err)
	}
}

func TestTooMany(t *testing.T) {
	const conns = 5
	port := listen(t, "tcp4", "127.0.0.1:0", upper)
	limits := dial.Limits()
	limits.Conns = conns
	h := newHost(t, limits)
	open := make([]*net.UnixConn, conns)
	for i := range open {
		c, err := h.dial("tcp4", port)
		if err != nil {
			t.Fatal(err)
		}
		open[i] = c
	}
	if _, err := h.dial("tcp4", port); err == nil || !strings.Contains(err.Error(), "too many connections") {
		t.Errorf("answer above the limit = %v; want too many connections", err)
	}
	open[0].CloseWrite()
	io.ReadAll(open[0])
	open[0].Close()
	deadline := time.Now().Add(patience)
	for { // the slot is free once the agent has noticed, which it tells nobody
		c, err := h.dial("tcp4", port)
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("answer below the limit = %v; want a connection", err)
		}
	}
	io.WriteString(open[1], "still")
	open[1].CloseWrite()
	if got, err := io.ReadAll(open[1]); string(got) != "STILL" || err != nil {
		t.Errorf("an open connection's answer = %q, %v; want %q", got, err, "STILL")
	}
	for _, c := range open {
		c.Close()
	}
}

func TestAllow(t *testing.T) {
	port := listen(t, "tcp4", "127.0.0.2:0", func(c *net.TCPConn) { io.WriteString(c, "hello") })
	allowed := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), uint16(port))
	cfg := dial.Limits()
	cfg.Allow = func(network string, to netip.AddrPort) error {
		if network != api.TCP || to != allowed {
			return errors.New("not that one")
		}
		return nil
	}
	h := newHost(t, cfg)
	c, err := h.dialAddr(api.TCP, allowed)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); string(got) != "hello" || err != nil {
		t.Errorf("what was allowed says %q, %v; want hello", got, err)
	}
	for _, other := range []string{"127.0.0.1", "::1"} {
		to := netip.AddrPortFrom(netip.MustParseAddr(other), uint16(port))
		if _, err := h.dialAddr(api.TCP, to); err == nil || !strings.Contains(err.Error(), "not that one") {
			t.Errorf("dial of %s = %v; want what Allow says", to, err)
		}
	}
	if _, err := h.dialAddr(api.UDP, allowed); err == nil || !strings.Contains(err.Error(), "not that one") {
		t.Errorf("dial by UDP = %v; want what Allow says", err)
	}
}

// echo answers datagrams with what they hold, twice. It returns its port.
func echo(t *testing.T) int {
	t.Helper()
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	go func() {
		b := make([]byte, api.MaxDatagram)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			c.WriteTo(append(b[:n:n], b[:n]...), from)
		}
	}()
	return c.LocalAddr().(*net.UDPAddr).Port
}

func TestDatagrams(t *testing.T) {
	cfg := dial.Limits()
	cfg.Idle = 300 * time.Millisecond
	h := newHost(t, cfg)
	to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(echo(t)))
	c, err := h.dialAddr(api.UDP, to)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"one", "", strings.Repeat("x", 30000)} {
		if err := api.WriteDatagram(c, []byte(text)); err != nil {
			t.Fatal(err)
		}
		if got, err := api.ReadDatagram(c); err != nil || string(got) != text+text {
			t.Errorf("answer to %d bytes = %d bytes, %v; want them twice", len(text), len(got), err)
		}
	}
	// A connection on which nothing comes back ends by itself.
	if b, err := io.ReadAll(c); len(b) != 0 || err != nil {
		t.Errorf("idle connection = %q, %v; want its end", b, err)
	}

	// Nobody listens there any more.
	gone, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	to = gone.LocalAddr().(*net.UDPAddr).AddrPort()
	gone.Close()
	if c, err = h.dialAddr(api.UDP, to); err != nil {
		t.Fatal(err)
	}
	if err := api.WriteDatagram(c, []byte("lost")); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); len(b) != 0 || err != nil {
		t.Errorf("connection to nobody = %q, %v; want its end", b, err)
	}
}

// inside counts what is done in a namespace.
type inside struct{ calls int }

func (n *inside) Do(_ context.Context, f func() error) error {
	n.calls++
	return f()
}

func TestNamespace(t *testing.T) {
	ns := &inside{}
	cfg := dial.Limits()
	cfg.Namespace = ns
	c, err := newHost(t, cfg).dial("tcp4", listen(t, "tcp4", "127.0.0.1:0", upper))
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(c, "x")
	c.CloseWrite()
	if got, err := io.ReadAll(c); string(got) != "X" || err != nil || ns.calls != 1 {
		t.Errorf("answer = %q, %v, %d calls in the namespace; want X and one", got, err, ns.calls)
	}
}
