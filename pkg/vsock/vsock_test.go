package vsock_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/vhostuser/vsock/vsocktest"
	"github.com/vmrt/vmrt/pkg/vsock"
)

// open opens a transport of the kind that needs nothing of the host.
func open(t testing.TB) vsock.Transport {
	t.Helper()
	tr, err := vsock.Open(vsock.VhostUser)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tr.Close() })
	return tr
}

// plug puts a fake guest where the VMM would be.
func plug(t testing.TB, tr vsock.Transport) *vsocktest.Guest {
	t.Helper()
	backend := tr.Device().Backend
	defer backend.Close()
	conn, err := net.FileConn(backend)
	if err != nil {
		t.Fatal(err)
	}
	g, err := vsocktest.New(conn.(*net.UnixConn), vsocktest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g
}

func TestOpen(t *testing.T) {
	if _, err := vsock.Open("carrier pigeon"); err == nil || !strings.Contains(err.Error(), `"carrier pigeon"`) {
		t.Errorf("Open of an unknown mode = %v; want an error with its name", err)
	}
	_, statErr := os.Stat("/dev/vhost-vsock")
	if errors.Is(statErr, os.ErrNotExist) {
		_, err := vsock.Open(vsock.Vhost)
		if !errors.Is(err, os.ErrNotExist) {
			t.Errorf("Open(vhost) without the device = %v; want %v", err, os.ErrNotExist)
		}
		tr, err := vsock.Open(vsock.Auto)
		if err != nil {
			t.Fatalf("Open(auto) = %v; want nil", err)
		}
		defer tr.Close()
		if tr.Name() != vsock.VhostUser {
			t.Errorf("Open(auto) without the device is %s; want %s", tr.Name(), vsock.VhostUser)
		}
	}
}

func TestDevice(t *testing.T) {
	tr := open(t)
	d := tr.Device()
	if d.CID != tr.CID() || d.CID < 3 || d.Backend == nil || d.VhostFD != nil {
		t.Errorf("Device() = %+v; want CID %d and a back end", d, tr.CID())
	}
	if again := tr.Device(); again != d {
		t.Errorf("second Device() = %+v; want %+v", again, d)
	}
}

func TestStreams(t *testing.T) {
	tr := open(t)
	g := plug(t, tr)
	if got, want := uint32(g.CID()), tr.CID(); got != want {
		t.Errorf("the guest's CID = %d; want %d", got, want)
	}
	l := g.Listen(9)
	host, err := tr.Dial(timeout(t), 9)
	if err != nil {
		t.Fatal(err)
	}
	inside, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := host.Write([]byte("down")); err != nil {
		t.Fatal(err)
	}
	if err := host.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(inside); err != nil || string(got) != "down" {
		t.Errorf("guest reads %q, %v; want %q", got, err, "down")
	}

	called := make(chan error, 1)
	go func() {
		c, err := g.Dial(timeout(t), tr.HostPort())
		if err == nil {
			_, err = c.Write([]byte("up"))
			c.Close()
		}
		called <- err
	}()
	host, err = tr.Accept(timeout(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := <-called; err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(host); err != nil || string(got) != "up" {
		t.Errorf("host reads %q, %v; want %q", got, err, "up")
	}
}

func TestContexts(t *testing.T) {
	tr := open(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := tr.Dial(ctx, 1); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Dial without a guest = %v; want %v", err, context.DeadlineExceeded)
	}
	if _, err := tr.Accept(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Accept without a guest = %v; want %v", err, context.DeadlineExceeded)
	}
}

// Close ends what waits, in every state of the machine.
func TestClose(t *testing.T) {
	for _, tc := range []struct {
		name    string
		prepare func(t *testing.T, tr vsock.Transport)
	}{
		{"before the machine", func(*testing.T, vsock.Transport) {}},
		{"while it runs", func(t *testing.T, tr vsock.Transport) { plug(t, tr) }},
		{"after it", func(t *testing.T, tr vsock.Transport) { plug(t, tr).Close() }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tr := open(t)
			waits := make(chan error, 1)
			go func() {
				_, err := tr.Accept(context.Background())
				waits <- err
			}()
			tc.prepare(t, tr)
			for range 2 {
				if err := tr.Close(); err != nil {
					t.Errorf("Close() = %v; want nil", err)
				}
			}
			if err := <-waits; err == nil {
				t.Error("Accept during Close = nil error; want one")
			}
			if _, err := tr.Dial(t.Context(), 1); err == nil {
				t.Error("Dial after Close = nil error; want one")
			}
		})
	}
}

func TestNoLeaks(t *testing.T) {
	round := func() {
		tr := open(t)
		g := plug(t, tr)
		l := g.Listen(9)
		c, err := tr.Dial(timeout(t), 9)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.Accept(); err != nil {
			t.Fatal(err)
		}
		tr.Close()
		c.Close()
		g.Close()
		open(t).Close()
	}
	round()
	goroutines, files := runtime.NumGoroutine(), openFiles(t)
	for range 20 {
		round()
	}
	more := func() bool { return runtime.NumGoroutine() > goroutines || openFiles(t) > files }
	for end := time.Now().Add(10 * time.Second); more() && time.Now().Before(end); {
		time.Sleep(time.Millisecond) // goroutines end after what ended them
	}
	if more() {
		t.Errorf("%d goroutines, %d files; want at most %d, %d", runtime.NumGoroutine(), openFiles(t), goroutines, files)
	}
}

func openFiles(t testing.TB) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

func TestClaimCID(t *testing.T) {
	t.Run("skips those in use", func(t *testing.T) {
		tried := map[uint64]bool{}
		cid, err := vsock.ClaimCID(func(cid uint64) error {
			if cid < 3 || cid >= 1<<32-1 {
				t.Errorf("tried CID %d, which is reserved", cid)
			}
			tried[cid] = true
			if len(tried) < 4 {
				return unix.EADDRINUSE
			}
			return nil
		})
		if err != nil || !tried[uint64(cid)] || len(tried) != 4 {
			t.Errorf("ClaimCID = %d, %v after %d tries; want the fourth", cid, err, len(tried))
		}
	})
	t.Run("gives up", func(t *testing.T) {
		_, err := vsock.ClaimCID(func(uint64) error { return unix.EADDRINUSE })
		if !errors.Is(err, unix.EADDRINUSE) {
			t.Errorf("ClaimCID with none free: %v; want %v", err, unix.EADDRINUSE)
		}
	})
	t.Run("other errors", func(t *testing.T) {
		tries := 0
		_, err := vsock.ClaimCID(func(uint64) error {
			tries++
			return unix.EPERM
		})
		if !errors.Is(err, unix.EPERM) || tries != 1 {
			t.Errorf("ClaimCID = %v after %d tries; want %v after 1", err, tries, unix.EPERM)
		}
	})
}

// What Linux says of a dial, as connect(2) reports it.
func TestDialErrors(t *testing.T) {
	for _, tc := range []struct {
		errno    error
		notReady bool
		want     error
	}{
		{unix.ETIMEDOUT, true, unix.ETIMEDOUT},
		{unix.ECONNREFUSED, true, unix.ECONNREFUSED},
		{unix.EHOSTUNREACH, true, unix.EHOSTUNREACH},
		{unix.ECONNRESET, false, unix.ECONNREFUSED},
		{unix.ENODEV, false, unix.ENODEV},
	} {
		err := &net.OpError{Op: "dial", Net: "vsock", Err: os.NewSyscallError("connect", tc.errno)}
		if got := vsock.NotReady(err); got != tc.notReady {
			t.Errorf("notReady(%v) = %t; want %t", err, got, tc.notReady)
		}
		if got := vsock.Refused(err); !errors.Is(got, tc.want) {
			t.Errorf("refused(%v) = %v; want %v", err, got, tc.want)
		}
	}
}
