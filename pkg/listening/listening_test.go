//go:build linux

package listening_test

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/listening"
	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/podns/podnstest"
)

// listen listens in pod's namespace until the test ends.
func listen(t *testing.T, pod *podns.Namespaces, network, address string, set func(fd int) error) (l net.Listener) {
	t.Helper()
	cfg := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if set == nil {
			return nil
		}
		if cerr := c.Control(func(fd uintptr) { err = set(int(fd)) }); cerr != nil {
			return cerr
		}
		return err
	}}
	cfg.SetMultipathTCP(false)
	err := pod.Do(t.Context(), func() (err error) {
		l, err = cfg.Listen(context.Background(), network, address)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func list(t *testing.T, pod *podns.Namespaces) (all []listening.Socket) {
	t.Helper()
	err := pod.Do(t.Context(), func() (err error) {
		all, err = listening.List()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(all, func(a, b listening.Socket) int { return int(a.Addr.Port()) - int(b.Addr.Port()) })
	return all
}

func TestList(t *testing.T) {
	pod := podnstest.Open(t, podns.Config{})
	if got := list(t, pod); len(got) != 0 {
		t.Errorf("List() in a new namespace = %v; want nothing", got)
	}
	reuse := func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }
	listen(t, pod, "tcp4", "0.0.0.0:1001", nil)
	loopback := listen(t, pod, "tcp4", "127.0.0.1:1002", nil)
	listen(t, pod, "tcp", "[::]:1003", nil)
	listen(t, pod, "tcp6", "[::]:1004", nil)
	listen(t, pod, "tcp6", "[::1]:1005", nil)
	listen(t, pod, "tcp4", "127.0.0.1:1006", reuse)
	listen(t, pod, "tcp4", "127.0.0.1:1006", reuse)
	// One of IPv6 that is at an IPv4 address.
	err := pod.Do(t.Context(), func() error {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		t.Cleanup(func() { unix.Close(fd) })
		mapped := unix.SockaddrInet6{Port: 1007, Addr: netip.MustParseAddr("::ffff:127.0.0.1").As16()}
		if err := unix.Bind(fd, &mapped); err != nil {
			return err
		}
		return unix.Listen(fd, 1)
	})
	if err != nil {
		t.Fatal(err)
	}
	// A connection is none.
	err = pod.Do(t.Context(), func() error {
		c, err := net.Dial("tcp", loopback.Addr().String())
		if err == nil {
			t.Cleanup(func() { c.Close() })
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []listening.Socket{
		{Addr: netip.MustParseAddrPort("0.0.0.0:1001")},
		{Addr: netip.MustParseAddrPort("127.0.0.1:1002")},
		{Addr: netip.MustParseAddrPort("[::]:1003")},
		{Addr: netip.MustParseAddrPort("[::]:1004"), V6Only: true},
		{Addr: netip.MustParseAddrPort("[::1]:1005")},
		{Addr: netip.MustParseAddrPort("127.0.0.1:1006")},
		{Addr: netip.MustParseAddrPort("127.0.0.1:1007")},
	}
	if diff := cmp.Diff(want, list(t, pod), cmp.Comparer(func(a, b listening.Socket) bool { return a == b })); diff != "" {
		t.Errorf("List() (-want +got):\n%s", diff)
	}
}

// More than fit into one message of the kernel's.
func TestListMany(t *testing.T) {
	pod := podnstest.Open(t, podns.Config{})
	for range 1000 {
		listen(t, pod, "tcp4", "127.0.0.1:0", nil)
	}
	if got := len(list(t, pod)); got != 1000 {
		t.Errorf("List() = %d sockets; want 1000", got)
	}
}

func BenchmarkList(b *testing.B) {
	for b.Loop() {
		if _, err := listening.List(); err != nil {
			b.Fatal(err)
		}
	}
}
