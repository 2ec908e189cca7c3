package vsock_test

import (
	"context"
	"errors"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/vhostuser/vsock"
	"github.com/vmrt/vmrt/pkg/vhostuser/vsock/vsocktest"
)

const (
	guestCID = 42
	port     = 1024
	// patience is for waits that end at once unless something is broken.
	patience = 10 * time.Second
)

// pair is a device with its guest.
type pair struct {
	*vsock.Device
	guest *vsocktest.Guest
	done  chan struct{}
	err   error // of Serve; set before done is closed
}

// newPair connects a device and a guest that runs. The test's end closes
// both.
func newPair(t testing.TB, cfg vsock.Config, gcfg vsocktest.Config) *pair {
	t.Helper()
	p := newStoppedPair(t, cfg, gcfg)
	if err := p.guest.Boot(); err != nil {
		t.Fatal(err)
	}
	return p
}

// newStoppedPair is newPair with a guest that has not booted.
func newStoppedPair(t testing.TB, cfg vsock.Config, gcfg vsocktest.Config) *pair {
	t.Helper()
	cfg.GuestCID = guestCID
	dev, err := vsock.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	front, back := socketpair(t)
	p := &pair{Device: dev, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.err = dev.Serve(context.Background(), back)
	}()
	if p.guest, err = vsocktest.NewStopped(front, gcfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.close)
	return p
}

// close ends both. Idempotent.
func (p *pair) close() {
	p.Device.Close()
	p.guest.Close()
	<-p.done
}

// wait returns what Serve returned.
func (p *pair) wait(t testing.TB) error {
	t.Helper()
	select {
	case <-p.done:
		return p.err
	case <-time.After(patience):
		t.Fatal("Serve goes on; want its end")
		return nil
	}
}

// dialGuest connects the host to the guest.
func (p *pair) dialGuest(t testing.TB) (host *vsock.Conn, guest *vsocktest.Conn) {
	t.Helper()
	l := p.guest.Listen(port)
	defer l.Close()
	host, err := p.Dial(timeout(t), port)
	if err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return host, c.(*vsocktest.Conn)
}

// dialHost connects the guest to the host.
func (p *pair) dialHost(t testing.TB) (host *vsock.Conn, guest *vsocktest.Conn) {
	t.Helper()
	l, err := p.Listen(port)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	guest, err = p.guest.Dial(timeout(t), port)
	if err != nil {
		t.Fatal(err)
	}
	host, err = l.AcceptContext(timeout(t))
	if err != nil {
		t.Fatal(err)
	}
	return host, guest
}

// timeout returns a context that ends the test rather than let it hang.
func timeout(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func socketpair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn := func(fd int) *net.UnixConn {
		f := os.NewFile(uintptr(fd), "socketpair")
		defer f.Close()
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		return c.(*net.UnixConn)
	}
	return conn(fds[0]), conn(fds[1])
}

// waitFor polls for a condition that nothing announces.
func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %s within %v", what, patience)
		}
	}
}

// wantErr checks for an error of a kind.
func wantErr(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: error %v; want %v", what, err, want)
	}
}

// held is what a process holds of what a device takes.
type held struct{ goroutines, descriptors, mappings int }

func holding(t testing.TB) held {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return held{runtime.NumGoroutine(), len(fds), strings.Count(string(maps), "memfd:vhosttest")}
}
