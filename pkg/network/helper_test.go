//go:build linux

package network_test

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/network"
	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/podns/podnstest"
)

func TestMain(m *testing.M) { podnstest.Main(m, nil) }

// patience bounds what a test waits for; nothing waits that long when it works.
const patience = 20 * time.Second

// netns is a network namespace of a test.
type netns struct {
	*podns.Namespaces
	t testing.TB
}

func newNetNS(t testing.TB) netns {
	t.Helper()
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skipf("needs iproute2: %v", err)
	}
	return netns{podnstest.Open(t, podns.Config{}), t}
}

// try runs a command in the namespace.
func (n netns) try(command string) (string, error) {
	n.t.Helper()
	var out bytes.Buffer
	args := strings.Fields(command)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := n.Start(cmd); err != nil {
		return "", err
	}
	err := cmd.Wait()
	return out.String(), err
}

// run runs commands in the namespace, one a line, that must succeed, and
// returns the output of the last.
func (n netns) run(commands string) string {
	n.t.Helper()
	var out string
	for line := range strings.Lines(commands) {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		var err error
		if out, err = n.try(line); err != nil {
			n.t.Fatalf("%s: %v\n%s", line, err, out)
		}
	}
	return out
}

// do runs f on the namespace's thread.
func (n netns) do(f func() error) {
	n.t.Helper()
	if err := n.Do(n.t.Context(), f); err != nil {
		n.t.Fatal(err)
	}
}

// peered makes a pod's namespace and one for what is outside, for the far
// ends of its interfaces.
func peered(t testing.TB) (pod, out netns) {
	t.Helper()
	return newNetNS(t), newNetNS(t)
}

// plug makes a pair of interfaces: name in the pod, with options of ip link
// add, and far outside.
func plug(pod, out netns, name, far, options string) {
	pod.t.Helper()
	out.run("ip link add name " + far + " type veth peer name " + name + " " + options + "\n" +
		"ip link set " + name + " netns " + pod.NetPath())
	out.up(far)
	pod.up(name)
	for _, end := range []struct {
		netns
		name string
	}{{pod, name}, {out, far}} {
		eventually(pod.t, "IPv6 of "+end.name, func() bool {
			addresses := end.run("ip -6 address show dev " + end.name)
			return strings.Contains(addresses, "fe80::") && !strings.Contains(addresses, "tentative")
		})
	}
}

// up brings an interface up, without the second that IPv6 looks for duplicates.
func (n netns) up(name string) {
	n.t.Helper()
	n.run("sysctl -qw net.ipv6.conf." + name + ".accept_dad=0\nip link set " + name + " up")
}

// open joins a pod's network.
func open(t testing.TB, pod netns, o network.Options) *network.Network {
	t.Helper()
	n, err := network.Open(t.Context(), pod, o)
	if err != nil {
		t.Fatalf("Open() = %v", err)
	}
	t.Cleanup(func() {
		if err := n.Close(context.Background()); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
	return n
}

// state is what must be the same before Open and after Close.
func (n netns) state() string {
	n.t.Helper()
	var b strings.Builder
	for _, c := range []string{"ip -d link", "ip address", "ip route show table all", "ip -6 route show table all", "ip rule", "ip neigh show nud permanent", "tc qdisc show"} {
		b.WriteString("# " + c + "\n" + n.run(c))
	}
	return b.String()
}

func (n netns) same(before string) {
	n.t.Helper()
	if diff := cmp.Diff(before, n.state()); diff != "" {
		n.t.Errorf("the namespace has changed (-before +after):\n%s", diff)
	}
}

// eventually calls ok until it is true. It is for what the kernel does by
// itself and tells nobody.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	podnstest.Wait(t, what, ok)
}

var comparePrefixes = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})

// etherTest is an EtherType for experiments (IEEE 802, local experimental 1).
const etherTest = 0x88b5

// frame is a broadcast frame with text in it.
func frame(text string) []byte {
	f := bytes.Repeat([]byte{0xff}, 6)
	f = append(f, 2, 0, 0, 0, 0, 0x99, etherTest>>8, etherTest&0xff)
	f = append(f, text...)
	return append(f, make([]byte, max(0, 60-len(f)))...)
}

// packetSocket opens a socket for frames of the test on an interface.
func (n netns) packetSocket(name string) int {
	n.t.Helper()
	fd := -1
	n.do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(htons(etherTest))); err != nil {
			return err
		}
		i, err := ifindex(fd, name)
		if err != nil {
			return err
		}
		return errors.Join(
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(etherTest), Ifindex: i}),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(patience.Seconds())}))
	})
	n.t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func ifindex(fd int, name string) (int, error) {
	r, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	err = unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, r)
	return int(r.Uint32()), err
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// vnetHeader is the length of struct virtio_net_hdr, which is in front of each
// frame of a tap until a VMM asks for more (linux/virtio_net.h).
const vnetHeader = 10

// receive reads frames of a tap until one is the test's.
func receive(t testing.TB, tap int) string {
	t.Helper()
	return receiveUntil(t, tap, func(f []byte) bool { return f[12] == etherTest>>8 && f[13] == etherTest&0xff })
}

func receiveUntil(t testing.TB, tap int, want func([]byte) bool) string {
	t.Helper()
	buf := make([]byte, 70000)
	for end := time.Now().Add(patience); ; {
		p := []unix.PollFd{{Fd: int32(tap), Events: unix.POLLIN}}
		if n, err := unix.Poll(p, int(max(0, time.Until(end)).Milliseconds())); n == 0 && err == nil {
			t.Fatal("no frame on the tap")
		}
		n, err := unix.Read(tap, buf)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			t.Fatalf("read tap: %v", err)
		}
		if f := buf[vnetHeader:n]; len(f) >= 14 && want(f) {
			return strings.TrimRight(string(f[14:]), "\x00")
		}
	}
}

func send(t testing.TB, tap int, f []byte) {
	t.Helper()
	if _, err := unix.Write(tap, append(make([]byte, vnetHeader), f...)); err != nil {
		t.Fatalf("write tap: %v", err)
	}
}

// exchange checks that frames pass between a tap and a socket outside.
func exchange(t testing.TB, tap, socket int) {
	t.Helper()
	if _, err := unix.Write(socket, frame("to the guest")); err != nil {
		t.Fatal(err)
	}
	if got := receive(t, tap); got != "to the guest" {
		t.Errorf("the tap has received %q; want what was sent outside", got)
	}
	send(t, tap, frame("from the guest"))
	buf := make([]byte, 2000)
	n, err := unix.Read(socket, buf)
	if err != nil {
		t.Fatalf("outside: %v", err)
	}
	if got := string(bytes.TrimRight(buf[14:n], "\x00")); got != "from the guest" {
		t.Errorf("outside has received %q; want what the guest sent", got)
	}
}
