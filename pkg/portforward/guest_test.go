//go:build linux

package portforward_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/podns/podnstest"
	"github.com/vmrt/vmrt/pkg/portforward"
	"github.com/vmrt/vmrt/pkg/relay"
)

// start begins to serve a new pod and ends that with the test.
func start(t testing.TB, dial portforward.DialFunc) (*podns.Namespaces, *portforward.Forwarder) {
	t.Helper()
	pod := podnstest.Open(t, podns.Config{})
	return pod, startIn(t, pod, dial)
}

func startIn(t testing.TB, pod *podns.Namespaces, dial portforward.DialFunc) *portforward.Forwarder {
	t.Helper()
	f, err := portforward.Start(t.Context(), pod, dial)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Errorf("Close() = %v; want nil", err)
		}
	})
	return f
}

// tryDial connects as containerd does: from inside the pod's namespace.
func tryDial(pod *podns.Namespaces, network, address string) (conn *net.TCPConn, err error) {
	err = pod.Do(context.Background(), func() error {
		c, err := net.DialTimeout(network, address, patience)
		if err == nil {
			conn = c.(*net.TCPConn)
			conn.SetDeadline(time.Now().Add(patience))
		}
		return err
	})
	return conn, err
}

func dial(t testing.TB, pod *podns.Namespaces, network, address string) *net.TCPConn {
	t.Helper()
	c, err := tryDial(pod, network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// guest is servers on a guest's loopback: what a DialFunc reaches.
type guest struct {
	pair func() (host, server relay.Conn, err error) // makes connections

	mu    sync.Mutex
	ports map[netip.AddrPort]func(relay.Conn)
	dials []string
}

func newGuest() *guest {
	return &guest{pair: tcpPair, ports: make(map[netip.AddrPort]func(relay.Conn))}
}

// listen has serve called with each connection to address.
func (g *guest) listen(address string, serve func(relay.Conn)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ports[netip.MustParseAddrPort(address)] = serve
}

func (g *guest) dial(_ context.Context, network string, port uint16) (portforward.Conn, error) {
	ip := netip.MustParseAddr("127.0.0.1")
	if network == "tcp6" {
		ip = netip.IPv6Loopback()
	}
	g.mu.Lock()
	g.dials = append(g.dials, fmt.Sprintf("%s %d", network, port))
	serve := g.ports[netip.AddrPortFrom(ip, port)]
	g.mu.Unlock()
	if serve == nil {
		return nil, unix.ECONNREFUSED
	}
	host, server, err := g.pair()
	if err != nil {
		return nil, err
	}
	go serve(server)
	return host, nil
}

func (g *guest) dialled() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.dials
}

// tcpPair returns two ends of a connection in this process's own namespace.
func tcpPair() (a, b relay.Conn, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		return nil, nil, err
	}
	d, err := l.Accept()
	if err != nil {
		c.Close()
		return nil, nil, err
	}
	return c.(*net.TCPConn), d.(*net.TCPConn), nil
}

// unixPair returns two ends of a connection without a reset of its own, as
// vsock is.
func unixPair() (a, b relay.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	var ends [2]relay.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		c, cerr := net.FileConn(f)
		f.Close()
		if cerr != nil {
			return nil, nil, cerr
		}
		ends[i] = c.(*net.UnixConn)
	}
	return ends[0], ends[1], nil
}

// say returns a server that writes text and closes.
func say(text string) func(relay.Conn) {
	return func(c relay.Conn) {
		io.WriteString(c, text)
		c.Close()
	}
}

func echo(c relay.Conn) {
	io.Copy(c, c)
	c.Close()
}
