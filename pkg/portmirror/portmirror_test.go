//go:build linux

package portmirror_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/listening"
	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/podns/podnstest"
	"github.com/vmrt/vmrt/pkg/portmirror"
	"github.com/vmrt/vmrt/pkg/relay"
)

const patience = 20 * time.Second

func TestMain(m *testing.M) { podnstest.Main(m, nil) }

// stream is one end of a pair.
type stream struct {
	ctx context.Context
	in  <-chan *api.ListeningPorts
	out chan<- *api.ListeningPorts
}

func (s stream) Send(l *api.ListeningPorts) error {
	select {
	case s.out <- l:
		return nil
	case <-s.ctx.Done():
		return context.Cause(s.ctx)
	}
}

func (s stream) Recv() (*api.ListeningPorts, error) {
	select {
	case l := <-s.in:
		return l, nil
	case <-s.ctx.Done():
		return nil, context.Cause(s.ctx)
	}
}

// side is a namespace with a Mirror.
type side struct {
	t      *testing.T
	pod    *podns.Namespaces
	mirror *portmirror.Mirror

	mu     sync.Mutex
	failed []string
}

func (s *side) failures() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}

// listen serves connections that are told name, what address they came to, and
// then all that they say. It does so until the test ends or close is called.
func (s *side) listen(network, address, name string) (close func()) {
	s.t.Helper()
	var l net.Listener
	var cfg net.ListenConfig
	cfg.SetMultipathTCP(false)
	err := s.pod.Do(s.t.Context(), func() (err error) {
		l, err = cfg.Listen(context.Background(), network, address)
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				fmt.Fprintf(c, "%s at %s\n", name, c.LocalAddr())
				io.Copy(c, c)
			}()
		}
	}()
	s.t.Cleanup(func() { l.Close() })
	return func() { l.Close() }
}

func (s *side) dial(address string) (*net.TCPConn, error) {
	var c net.Conn
	err := s.pod.Do(context.Background(), func() (err error) {
		c, err = net.DialTimeout("tcp", address, patience)
		return err
	})
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn), nil
}

// ask returns what a server says; "refused" where there is none.
func (s *side) ask(address string) string {
	c, err := s.dial(address)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return "refused"
	}
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	c.CloseWrite()
	b, err := io.ReadAll(c)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(b))
}

func (s *side) await(address, want string) {
	s.t.Helper()
	podnstest.Wait(s.t, fmt.Sprintf("%q at %s", want, address), func() bool { return s.ask(address) == want })
}

func (s *side) want(address, want string) {
	s.t.Helper()
	if got := s.ask(address); got != want {
		s.t.Errorf("who is at %s: %q; want %q", address, got, want)
	}
}

// pair runs two mirrors, of which the second stands for a guest, until the test
// ends or stop is called. Before that, prepare may listen.
func pair(t *testing.T, prepare func(host, guest *side)) (host, guest *side, stop func()) {
	host = &side{t: t, pod: podnstest.Open(t, podns.Config{})}
	guest = &side{t: t, pod: podnstest.Open(t, podns.Config{})}
	prepare(host, guest)
	ctx, cancel := context.WithCancel(context.Background())
	there, back := make(chan *api.ListeningPorts), make(chan *api.ListeningPorts)
	var running, ready sync.WaitGroup
	for _, s := range []struct {
		this, other *side
		stream      stream
	}{{host, guest, stream{ctx, back, there}}, {guest, host, stream{ctx, there, back}}} {
		s.this.mirror = portmirror.New(portmirror.Config{
			Namespace: s.this.pod, MaxConns: 16, DialTimeout: patience, First: s.this == host,
			Dial: func(_ context.Context, to netip.AddrPort) (relay.Conn, error) {
				return s.other.dial(to.String())
			},
			Failed: func(l listening.Socket, err error) {
				s.this.mu.Lock()
				defer s.this.mu.Unlock()
				s.this.failed = append(s.this.failed, fmt.Sprintf("%s: %v", l, err))
			},
		})
		ready.Add(1)
		running.Go(func() {
			if err := s.this.mirror.Run(ctx, s.stream, ready.Done); !errors.Is(err, context.Canceled) {
				t.Errorf("Run() = %v; want its context's error", err)
			}
		})
	}
	stop = func() {
		cancel()
		running.Wait()
	}
	t.Cleanup(stop)
	ready.Wait()
	return host, guest, stop
}

func nothing(_, _ *side) {}

func TestMirror(t *testing.T) {
	host, guest, stop := pair(t, func(host, _ *side) {
		host.listen("tcp4", "0.0.0.0:1001", "host")
		host.listen("tcp4", "127.0.0.53:53", "host")
	})
	// What the host had is there from the beginning.
	guest.want("127.0.0.1:1001", "host at 127.0.0.1:1001")
	guest.want("127.0.0.9:1001", "host at 127.0.0.9:1001")
	guest.want("127.0.0.53:53", "host at 127.0.0.53:53")
	guest.want("127.0.0.1:53", "refused")

	guest.listen("tcp", "[::]:2001", "guest")
	guest.listen("tcp6", "[::]:2002", "guest")
	guest.listen("tcp6", "[::1]:2003", "guest")
	guest.listen("tcp4", "127.0.0.1:2004", "guest")
	host.await("127.0.0.1:2004", "guest at 127.0.0.1:2004")
	host.want("127.0.0.1:2001", "guest at 127.0.0.1:2001")
	host.want("[::1]:2001", "guest at [::1]:2001")
	host.want("[::1]:2002", "guest at [::1]:2002")
	host.want("127.0.0.1:2002", "refused")
	host.want("[::1]:2003", "guest at [::1]:2003")
	host.want("127.0.0.2:2004", "refused")
	if f := append(host.failures(), guest.failures()...); len(f) != 0 {
		t.Errorf("failures = %q; want none", f)
	}
	stop()
	for _, address := range []string{"127.0.0.1:2001", "[::1]:2002", "127.0.0.1:2004"} {
		host.want(address, "refused")
	}
	guest.want("127.0.0.1:1001", "refused")
	host.want("127.0.0.1:1001", "host at 127.0.0.1:1001")
}

// A socket that is closed is closed on the other side; its connections stay.
func TestClosed(t *testing.T) {
	host, guest, _ := pair(t, nothing)
	end := guest.listen("tcp4", "0.0.0.0:80", "first")
	host.await("127.0.0.1:80", "first at 127.0.0.1:80")
	c, err := host.dial("127.0.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	greeting := make([]byte, len("first"))
	if _, err := io.ReadFull(c, greeting); err != nil {
		t.Fatal(err)
	}
	end()
	host.await("127.0.0.1:80", "refused")
	io.WriteString(c, "still here")
	c.CloseWrite()
	if b, err := io.ReadAll(c); !strings.HasSuffix(string(b), "still here") || err != nil {
		t.Errorf("connection to a socket that was closed: %q, %v; want an echo", b, err)
	}
	// The port is anybody's now.
	host.listen("tcp4", "0.0.0.0:80", "host")
	guest.await("127.0.0.1:80", "host at 127.0.0.1:80")
}

// A port that is taken on one side is taken on the other, as on one machine.
func TestTaken(t *testing.T) {
	host, guest, _ := pair(t, func(host, _ *side) { host.listen("tcp4", "0.0.0.0:80", "host") })
	err := guest.pod.Do(t.Context(), func() error {
		l, err := net.Listen("tcp4", "127.0.0.1:80")
		if err == nil {
			l.Close()
		}
		return err
	})
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("listen in the guest at a port of the host = %v; want %v", err, syscall.EADDRINUSE)
	}
	guest.listen("tcp4", "0.0.0.0:81", "guest")
	host.await("127.0.0.1:81", "guest at 127.0.0.1:81")
	err = host.pod.Do(t.Context(), func() error {
		l, err := net.Listen("tcp4", "0.0.0.0:81")
		if err == nil {
			l.Close()
		}
		return err
	})
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("listen on the host at a port of the guest = %v; want %v", err, syscall.EADDRINUSE)
	}
}

// Both sides had the port before they knew of each other: each keeps its own,
// and the guest's is reached once the host's has gone.
func TestConflict(t *testing.T) {
	var end func()
	host, guest, _ := pair(t, func(host, guest *side) {
		end = host.listen("tcp4", "127.0.0.1:80", "host")
		guest.listen("tcp4", "0.0.0.0:80", "guest")
	})
	host.want("127.0.0.1:80", "host at 127.0.0.1:80")
	guest.want("127.0.0.1:80", "guest at 127.0.0.1:80")
	podnstest.Wait(t, "both failures", func() bool { return len(host.failures()) > 0 && len(guest.failures()) > 0 })
	end()
	host.await("127.0.0.1:80", "guest at 127.0.0.1:80")
	for _, s := range []*side{host, guest} {
		if f := s.failures(); len(f) != 1 || !strings.Contains(f[0], "address already in use") {
			t.Errorf("failures = %q; want one that says so", f)
		}
	}
}

// An address that the other side does not have is reported, and no more.
func TestForeignAddress(t *testing.T) {
	host, guest, _ := pair(t, nothing)
	guest.listen("tcp4", "127.0.0.1:80", "guest")
	err := guest.pod.Do(t.Context(), func() error { return addAddress("192.0.2.7/32") })
	if err != nil {
		t.Fatal(err)
	}
	guest.listen("tcp4", "192.0.2.7:81", "guest")
	podnstest.Wait(t, "a failure", func() bool { return len(host.failures()) > 0 })
	if f := host.failures(); len(f) != 1 || !strings.HasPrefix(f[0], "192.0.2.7:81: ") {
		t.Errorf("failures = %q; want one of 192.0.2.7:81", f)
	}
	host.await("127.0.0.1:80", "guest at 127.0.0.1:80")
}

func TestOffers(t *testing.T) {
	host, _, _ := pair(t, func(host, _ *side) {
		host.listen("tcp4", "0.0.0.0:1", "")
		host.listen("tcp6", "[::]:2", "")
		host.listen("tcp", "[::]:3", "")
		host.listen("tcp4", "127.0.0.1:4", "")
	})
	for to, want := range map[string]bool{
		"192.0.2.1:1": true, "[2001:db8::1]:1": false,
		"192.0.2.1:2": false, "[2001:db8::1]:2": true,
		"192.0.2.1:3": true, "[2001:db8::1]:3": true,
		"127.0.0.1:4": true, "127.0.0.2:4": false, "127.0.0.1:5": false,
	} {
		if got := host.mirror.Offers(netip.MustParseAddrPort(to)); got != want {
			t.Errorf("Offers(%s) = %v; want %v", to, got, want)
		}
	}
}

// What a guest that lies can send ends the mirror, not the host.
func TestHostile(t *testing.T) {
	port := func(address []byte, port uint32) *api.ListeningPorts {
		return &api.ListeningPorts{Ports: []*api.ListeningPort{{Address: address, Port: port}}}
	}
	many := &api.ListeningPorts{Ports: make([]*api.ListeningPort, api.MaxListeningPorts+1)}
	for i := range many.Ports {
		many.Ports[i] = &api.ListeningPort{Address: []byte{127, 0, 0, 1}, Port: uint32(i + 1)}
	}
	for name, tc := range map[string]struct {
		list *api.ListeningPorts
		want string
	}{
		"short address": {port([]byte{1, 2, 3}, 80), "listening socket at 010203, port 80: want an IP address and a port"},
		"no address":    {port(nil, 80), "listening socket at , port 80"},
		"mapped":        {port(netip.MustParseAddr("::ffff:1.2.3.4").AsSlice(), 80), "listening socket at"},
		"port 0":        {port([]byte{127, 0, 0, 1}, 0), "port 0: want"},
		"large port":    {port([]byte{127, 0, 0, 1}, 65536), "port 65536: want"},
		"nil":           {&api.ListeningPorts{Ports: []*api.ListeningPort{nil}}, "want an IP address"},
		"too many":      {many, "1025 listening sockets: at most 1024"},
	} {
		t.Run(name, func(t *testing.T) {
			pod := podnstest.Open(t, podns.Config{})
			in, out := make(chan *api.ListeningPorts, 1), make(chan *api.ListeningPorts, 1)
			in <- tc.list
			err := portmirror.New(portmirror.Config{Namespace: pod, First: true, MaxConns: 1}).Run(t.Context(), stream{t.Context(), in, out}, func() {})
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Run() = %v; want %q", err, tc.want)
			}
		})
	}
}

// A guest that changes its mind all the time keeps the host busy a few times a
// second, and no more.
func TestFlood(t *testing.T) {
	pod := podnstest.Open(t, podns.Config{})
	ctx, cancel := context.WithCancel(t.Context())
	in, out := make(chan *api.ListeningPorts), make(chan *api.ListeningPorts, 1)
	done := make(chan error, 1)
	go func() {
		done <- portmirror.New(portmirror.Config{Namespace: pod, First: true, MaxConns: 1}).Run(ctx, stream{ctx, in, out}, func() {})
	}()
	<-out
	const flood = time.Second
	taken := 0
	for end := time.After(flood); end != nil; {
		list := &api.ListeningPorts{Ports: []*api.ListeningPort{{Address: []byte{127, 0, 0, 1}, Port: uint32(taken%2 + 80)}}}
		select {
		case in <- list:
			taken++
		case <-end:
			end = nil
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Run() = %v; want %v", err, context.Canceled)
	}
	// An honest guest sends one an Interval.
	if honest := int(flood / portmirror.Interval); taken < honest || taken > 10*honest {
		t.Errorf("%d lists were taken in %v; want at least %d and at most %d", taken, flood, honest, 10*honest)
	}
}
