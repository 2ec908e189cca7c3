//go:build linux

package portforward_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/podns/podnstest"
	"github.com/vmrt/vmrt/pkg/portforward"
)

// listenIn listens inside a pod's namespace until the test ends.
func listenIn(t testing.TB, pod *podns.Namespaces, address string) net.Listener {
	t.Helper()
	var l net.Listener
	err := pod.Do(context.Background(), func() (err error) {
		l, err = net.Listen("tcp", address)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// addAddress adds an address to lo in the pod's namespace: it belongs to
// the pod, as the CNI's do.
func addAddress(t *testing.T, pod *podns.Namespaces, ip [4]byte) {
	t.Helper()
	err := pod.Do(t.Context(), func() error {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		r, err := unix.NewIfreq("lo:1")
		if err != nil {
			return err
		}
		if err := r.SetInet4Addr(ip[:]); err != nil {
			return err
		}
		return unix.IoctlIfreq(s, unix.SIOCSIFADDR, r)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func wantRefused(t *testing.T, pod *podns.Namespaces, network, address string) {
	t.Helper()
	c, err := tryDial(pod, network, address)
	if err == nil {
		c.Close()
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dial %s = %v; want refused", address, err)
	}
}

// wantFrom dials and expects to read text.
func wantFrom(t *testing.T, pod *podns.Namespaces, network, address, text string) {
	t.Helper()
	c := dial(t, pod, network, address)
	if got, err := io.ReadAll(c); string(got) != text || err != nil {
		t.Errorf("read from %s = %q, %v; want %q", address, got, err, text)
	}
	c.Close()
}

// serveText has l say text to everybody.
func serveText(l net.Listener, text string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		say(text)(c.(*net.TCPConn))
	}
}

func TestOwnAddressesOfThePod(t *testing.T) {
	g := newGuest()
	for _, port := range []string{"80", "81"} {
		g.listen("127.0.0.1:"+port, say("guest"))
	}
	pod, _ := start(t, g.dial)
	addAddress(t, pod, [4]byte{10, 9, 8, 7})
	go serveText(listenIn(t, pod, "10.9.8.7:80"), "host")
	wantFrom(t, pod, "tcp4", "10.9.8.7:80", "host")
	wantRefused(t, pod, "tcp4", "10.9.8.7:81")
	wantFrom(t, pod, "tcp4", "127.0.0.1:80", "guest")

	// One end alone is not enough: a router could let it in from outside.
	err := pod.Do(t.Context(), func() error {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(10, 9, 8, 7)}}
		c, err := d.Dial("tcp4", "127.0.0.1:81")
		if err == nil {
			c.Close()
		}
		return err
	})
	if !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dial from 10.9.8.7 to loopback = %v; want refused", err)
	}
}

func TestListenersOfTheNamespace(t *testing.T) {
	g := newGuest()
	for port := 80; port < 87; port++ {
		g.listen(fmt.Sprintf("127.0.0.1:%d", port), say("guest"))
		g.listen(fmt.Sprintf("[::1]:%d", port), say("guest"))
	}
	pod := podnstest.Open(t, podns.Config{})
	addAddress(t, pod, [4]byte{10, 9, 8, 7})
	for _, address := range []string{"127.0.0.1:80", "0.0.0.0:81", "[::1]:82", "[::]:83", "127.3.3.3:84", "10.9.8.7:85"} {
		go serveText(listenIn(t, pod, address), "host")
	}
	for port := range 400 { // more than one answer of the kernel holds
		listenIn(t, pod, fmt.Sprintf("127.0.0.1:%d", 10000+port))
	}
	go serveText(listenIn(t, pod, "127.0.0.1:20000"), "host")
	startIn(t, pod, g.dial)
	for _, tc := range []struct{ network, address, want string }{
		{"tcp4", "127.0.0.1:80", "host"},
		{"tcp4", "127.0.0.1:81", "host"},
		{"tcp6", "[::1]:82", "host"},
		{"tcp6", "[::1]:83", "host"},
		{"tcp4", "127.0.0.1:83", "host"},
		{"tcp4", "127.3.3.3:84", "host"},
		{"tcp4", "127.0.0.1:85", "guest"}, // that one listens elsewhere
		{"tcp4", "127.0.0.1:86", "guest"},
		{"tcp4", "127.0.0.1:20000", "host"},
	} {
		wantFrom(t, pod, tc.network, tc.address, tc.want)
	}
}

func TestDatagramsAreLeftAlone(t *testing.T) {
	pod, _ := start(t, newGuest().dial)
	err := pod.Do(t.Context(), func() error {
		server, err := net.ListenPacket("udp4", "127.0.0.1:53")
		if err != nil {
			return err
		}
		defer server.Close()
		c, err := net.Dial("udp4", "127.0.0.1:53")
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		_, _, err = server.ReadFrom(make([]byte, 1))
		return err
	})
	if err != nil {
		t.Errorf("a datagram over the pod's loopback: %v", err)
	}
}

func TestTwoPods(t *testing.T) {
	one, two := newGuest(), newGuest()
	one.listen("127.0.0.1:80", say("one"))
	two.listen("127.0.0.1:80", say("two"))
	podOne, first := start(t, one.dial)
	podTwo, _ := start(t, two.dial)
	other := podnstest.Open(t, podns.Config{})
	wantFrom(t, podOne, "tcp4", "127.0.0.1:80", "one")
	wantFrom(t, podTwo, "tcp4", "127.0.0.1:80", "two")
	wantRefused(t, other, "tcp4", "127.0.0.1:80")
	wantRefused(t, other, "tcp6", "[::1]:80")
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	wantRefused(t, podOne, "tcp4", "127.0.0.1:80")
	wantFrom(t, podTwo, "tcp4", "127.0.0.1:80", "two")
}

// links returns how many programs are attached to the pod's namespace.
func links(t *testing.T, pod *podns.Namespaces) int {
	t.Helper()
	netns, err := pod.Net()
	if err != nil {
		t.Fatal(err)
	}
	defer netns.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(netns.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	n := 0
	it := new(link.Iterator)
	defer it.Close()
	for it.Next() {
		if info, err := it.Link.Info(); err == nil && info.NetNs() != nil && uint64(info.NetNs().NetnsIno) == st.Ino {
			n++
		}
	}
	if err := it.Err(); err != nil {
		t.Fatal(err)
	}
	return n
}

// A namespace that somebody else holds is afterwards what it was, whatever
// was under way. podnstest looks for descriptors and goroutines.
func TestCloseLeavesNothing(t *testing.T) {
	owner := podnstest.Open(t, podns.Config{})
	path := filepath.Join(t.TempDir(), "netns")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(owner.NetPath(), path, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })

	pod := podnstest.Open(t, podns.Config{NetNS: path})
	g := newGuest()
	g.listen("127.0.0.1:80", echo)
	dialling := make(chan struct{})
	f := startIn(t, pod, func(ctx context.Context, network string, port uint16) (portforward.Conn, error) {
		if port == 80 {
			return g.dial(ctx, network, port)
		}
		close(dialling)
		<-ctx.Done() // the guest does not answer
		return nil, ctx.Err()
	})
	if n := links(t, owner); n != 1 {
		t.Errorf("%d programs are attached to the namespace; want 1", n)
	}
	idle := dial(t, pod, "tcp4", "127.0.0.1:80")
	busy := dial(t, pod, "tcp4", "127.0.0.1:80")
	io.WriteString(idle, "x")
	io.ReadFull(idle, make([]byte, 1))
	go func() {
		for b := make([]byte, 64<<10); ; {
			if _, err := busy.Write(b); err != nil { // nobody reads the echo
				return
			}
		}
	}()
	waiting := dial(t, pod, "tcp4", "127.0.0.1:81")
	<-dialling
	for range 2 {
		if err := f.Close(); err != nil {
			t.Errorf("Close() = %v; want nil", err)
		}
	}
	for name, c := range map[string]net.Conn{"idle": idle, "waiting": waiting} {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("read from the %s connection after Close = %v; want a reset", name, err)
		}
	}
	if n := links(t, owner); n != 0 {
		t.Errorf("%d programs are attached to the namespace after Close; want none", n)
	}
	if err := pod.Close(); err != nil {
		t.Fatal(err)
	}
	wantRefused(t, owner, "tcp4", "127.0.0.1:80")
	wantRefused(t, owner, "tcp6", "[::1]:80")
	sockets := ""
	err := owner.Do(t.Context(), func() error {
		b, err := os.ReadFile("/proc/thread-self/net/tcp")
		sockets = string(b)
		return err
	})
	if err != nil || strings.Contains(sockets, " 0A ") {
		t.Errorf("sockets of the namespace after Close, %v:\n%s\nwant none that listens", err, sockets)
	}

	// Another one may follow.
	again := podnstest.Open(t, podns.Config{NetNS: path})
	startIn(t, again, g.dial)
	c := dial(t, owner, "tcp4", "127.0.0.1:80")
	io.WriteString(c, "again")
	c.CloseWrite()
	if got, err := io.ReadAll(c); string(got) != "again" || err != nil {
		t.Errorf("echo from the namespace's next Forwarder = %q, %v; want %q", got, err, "again")
	}
}

// The namespace has no address on loopback when Start is called.
func TestLoopbackComesLater(t *testing.T) {
	pod := podnstest.Open(t, podns.Config{})
	setLoopback := func(up bool) {
		t.Helper()
		err := pod.Do(t.Context(), func() error {
			s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(s)
			r, err := unix.NewIfreq("lo")
			if err != nil {
				return err
			}
			if up {
				r.SetUint16(unix.IFF_UP | unix.IFF_LOOPBACK)
			} else {
				r.SetUint16(unix.IFF_LOOPBACK)
			}
			return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, r)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	setLoopback(false)
	g := newGuest()
	g.listen("127.0.0.1:80", say("v4"))
	g.listen("[::1]:80", say("v6"))
	startIn(t, pod, g.dial)
	setLoopback(true)
	wantFrom(t, pod, "tcp4", "127.0.0.1:80", "v4")
	wantFrom(t, pod, "tcp6", "[::1]:80", "v6")
}

// thread runs functions on the process's side.
type thread struct{}

func (thread) Do(_ context.Context, f func() error) error { return f() }

func TestHostNetwork(t *testing.T) {
	podnstest.Root(t)
	f, err := portforward.Start(t.Context(), thread{}, newGuest().dial)
	if err == nil {
		f.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "the pod has the host's network") {
		t.Errorf("Start() in the process's own namespace = %v; want a refusal", err)
	}
}

func TestClosedPod(t *testing.T) {
	pod := podnstest.Open(t, podns.Config{})
	pod.Close()
	if _, err := portforward.Start(t.Context(), pod, newGuest().dial); !errors.Is(err, podns.ErrClosed) {
		t.Errorf("Start() of a closed pod = %v; want %v", err, podns.ErrClosed)
	}
}

// helpers are processes whose whole life is one call of Start under some
// restriction; they print the result.
var helpers = map[string]func(){
	"nocaps":     func() { restricted(dropCapabilities) },
	"nobpf":      func() { restricted(func() error { return failBPF(unix.ENOSYS, ^uint32(0)) }) },
	"nosklookup": func() { restricted(func() error { return failBPF(unix.EINVAL, unix.BPF_PROG_LOAD) }) },
	"nolink":     func() { restricted(func() error { return failBPF(unix.EINVAL, unix.BPF_LINK_CREATE) }) },
	"nomap":      func() { restricted(func() error { return failBPF(unix.EINVAL, unix.BPF_MAP_CREATE) }) },
	"lowmemlock": func() { restricted(func() error { return unix.Prlimit(0, unix.RLIMIT_MEMLOCK, &unix.Rlimit{}, nil) }) },
	"nobtf":      func() { restricted(func() error { return failBPF(unix.EINVAL, unix.BPF_BTF_LOAD) }) },
}

func restricted(restrict func() error) {
	runtime.LockOSThread() // capabilities are the thread's
	if l, err := net.Listen("tcp", "127.0.0.1:0"); err == nil {
		l.Close() // Go's poller has its descriptors from here on
	}
	pod, err := podns.Open(podns.Config{})
	if err == nil {
		defer pod.Close()
		err = restrict()
	}
	if err != nil {
		fmt.Println("prepare:", err)
		return
	}
	before := descriptors()
	f, err := portforward.Start(context.Background(), pod, newGuest().dial)
	switch {
	case err == nil:
		f.Close()
		fmt.Println("works")
	case errors.Is(err, portforward.ErrNotSupported):
		fmt.Println("unsupported:", err)
	default:
		fmt.Println("failed:", err)
	}
	if after := descriptors(); after > before {
		fmt.Printf("%d descriptors are open, %d were\n", after, before)
	}
}

func descriptors() int {
	d, _ := os.ReadDir("/proc/self/fd")
	return len(d)
}

// dropCapabilities leaves this thread without the ones that BPF asks for.
func dropCapabilities() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return err
	}
	for _, c := range []uint{unix.CAP_SYS_ADMIN, unix.CAP_BPF, unix.CAP_NET_ADMIN} {
		data[c/32].Effective &^= 1 << (c % 32)
		data[c/32].Permitted &^= 1 << (c % 32)
	}
	return unix.Capset(&hdr, &data[0])
}

// failBPF makes bpf(2) fail on all threads, for one command or, if cmd is the
// largest number, for all.
func failBPF(errno unix.Errno, cmd uint32) error {
	const nr, arg0 = 0, 16 // struct seccomp_data, on a little-endian machine
	skip := uint8(1)       // the check of the command
	if cmd != ^uint32(0) {
		skip = 0
	}
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: nr},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_BPF, Jf: 4},
		{Code: unix.BPF_JMP | unix.BPF_JA, K: uint32(skip) * 2},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: arg0},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: cmd, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(errno)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(filter)
	if e != 0 {
		return e
	}
	return nil
}

func TestRestrictedHosts(t *testing.T) {
	podnstest.Root(t)
	for _, tc := range []struct{ name, want string }{
		{"nocaps", "unsupported: port-forward: make the socket map: not supported here: it needs CAP_BPF and CAP_NET_ADMIN"},
		{"nobpf", "unsupported: port-forward: make the socket map: not supported here: it needs the system call bpf"},
		{"nomap", "unsupported: port-forward: make the socket map: not supported here: it needs socket maps"},
		{"nosklookup", "unsupported: port-forward: load the sk_lookup program: not supported here: it needs sk_lookup programs"},
		{"nolink", "unsupported: port-forward: attach the sk_lookup program: not supported here: it needs sk_lookup programs"},
		{"lowmemlock", "works"},
		{"nobtf", "works"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out, err := podnstest.Helper(tc.name).Output()
			line, rest, _ := strings.Cut(string(out), "\n")
			if err != nil || !strings.HasPrefix(line, tc.want) || rest != "" {
				t.Errorf("Start() on such a host: %q, %v; want %q", out, err, tc.want)
			}
			t.Log(line)
		})
	}
}
