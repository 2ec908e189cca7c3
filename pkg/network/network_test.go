//go:build linux

package network_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/network"
)

// twoInterfaces makes a pod with what a CNI would make.
func twoInterfaces(t *testing.T) (pod, out netns) {
	pod, out = peered(t)
	plug(pod, out, "eth0", "h0", "address 02:00:00:00:00:01 mtu 1400")
	plug(pod, out, "net1", "h1", "address 02:00:00:00:00:02 mtu 9000")
	out.run("ip link set h0 mtu 1400\nip link set h1 mtu 9000\nip address add 10.1.0.1/24 dev h0\nip address add fd00:1::1/64 dev h0 nodad")
	pod.run("ip address add 10.1.0.2/24 dev eth0\nip address add fd00:1::2/64 dev eth0 nodad\nip route add default via 10.1.0.1\nip address add 10.2.0.2/24 dev net1")
	// The kernel makes the route to an IPv6 address a little later.
	eventually(t, "the local route", func() bool { return strings.Contains(pod.run("ip -6 route show table local"), "fd00:1::2") })
	return pod, out
}

func taps(pod netns) int {
	pod.t.Helper()
	return strings.Count(pod.run("ip -o link"), ": vmrt-tap")
}

func TestOpenClose(t *testing.T) {
	pod, out := twoInterfaces(t)
	before := pod.state()
	for _, queues := range []int{1, 4, 99} {
		n := open(t, pod, network.Options{Queues: queues, Spares: 1})
		nics := n.NICs()
		if len(nics) != 3 || nics[0].MAC != "02:00:00:00:00:01" || nics[1].MAC != "02:00:00:00:00:02" {
			t.Fatalf("NICs() = %+v; want three, two with the interfaces' hardware addresses", nics)
		}
		if m, err := net.ParseMAC(nics[2].MAC); err != nil || m[0]&3 != 2 {
			t.Errorf("a spare's hardware address = %s; want a local one", nics[2].MAC)
		}
		for _, nic := range nics {
			if got, want := len(nic.Tap), min(queues, 8); got != want {
				t.Errorf("%d queues for %d CPUs; want %d", got, queues, want)
			}
			if len(nic.VhostNet) != 0 && len(nic.VhostNet) != len(nic.Tap) {
				t.Errorf("%d vhost-net descriptors for %d queues", len(nic.VhostNet), len(nic.Tap))
			}
		}
		if _, err := os.Stat("/dev/vhost-net"); err == nil && len(nics[0].VhostNet) == 0 {
			t.Error("no vhost-net descriptors although there is /dev/vhost-net")
		}
		for i, mtu := range []string{"mtu 1400 ", "mtu 9000 "} {
			if got := pod.run(fmt.Sprintf("ip -o link show dev vmrt-tap%d", i)); !strings.Contains(got, mtu) {
				t.Errorf("tap %d: %s; want %s", i, got, mtu)
			}
		}
		if queues == 1 {
			exchange(t, int(nics[0].Tap[0].Fd()), out.packetSocket("h0"))
			exchange(t, int(nics[1].Tap[0].Fd()), out.packetSocket("h1"))
		}
		if err := n.Close(t.Context()); err != nil {
			t.Errorf("Close() = %v", err)
		}
		pod.same(before)
		if err := n.Close(t.Context()); err != nil {
			t.Errorf("second Close() = %v", err)
		}
		if err := n.Update(t.Context()); err == nil {
			t.Error("Update() after Close = nil; want an error")
		}
	}
}

// TestHostIsSilent: the host's stack answers before Open and after Close, and
// in between nothing but the guest would.
func TestHostIsSilent(t *testing.T) {
	pod, out := twoInterfaces(t)
	l := listen(t, pod, "10.1.0.2:7")
	defer l.Close()
	answers := func() (string, error) {
		out.try("ip neigh flush dev h0")
		var got []string
		for _, c := range []string{"busybox ping -c 1 -W 1 10.1.0.2", "busybox ping -c 1 -W 1 fd00:1::2"} {
			if _, err := out.try(c); err == nil {
				got = append(got, c)
			}
		}
		// With the hardware address known, TCP shows whether the stack resets.
		out.run("ip neigh replace 10.1.0.2 lladdr 02:00:00:00:00:01 dev h0")
		for _, addr := range []string{"10.1.0.2:7", "10.1.0.2:8"} {
			if err := dialIn(out, addr, time.Second); err == nil || errors.Is(err, unix.ECONNREFUSED) {
				got = append(got, addr)
			}
		}
		return strings.Join(got, ", "), nil
	}
	const all = "busybox ping -c 1 -W 1 10.1.0.2, busybox ping -c 1 -W 1 fd00:1::2, 10.1.0.2:7, 10.1.0.2:8"
	if got, _ := answers(); got != all {
		t.Fatalf("answers before Open: %q; want %q", got, all)
	}
	n := open(t, pod, network.Options{})
	if got, _ := answers(); got != "" {
		t.Errorf("answers after Open: %q; want none", got)
	}
	// The guest has seen the questions.
	for what, want := range map[string]func([]byte) bool{
		"ARP":  func(f []byte) bool { return f[12] == 8 && f[13] == 6 },
		"IPv6": func(f []byte) bool { return f[12] == 0x86 && f[13] == 0xdd && f[20] == unix.IPPROTO_ICMPV6 },
		"TCP":  func(f []byte) bool { return f[12] == 8 && f[13] == 0 && f[23] == unix.IPPROTO_TCP },
	} {
		out.try("ip neigh flush dev h0")
		switch what {
		case "ARP":
			out.try("busybox ping -c 1 -W 1 10.1.0.2")
		case "IPv6":
			out.try("busybox ping -c 1 -W 1 fd00:1::2")
		case "TCP":
			out.run("ip neigh replace 10.1.0.2 lladdr 02:00:00:00:00:01 dev h0")
			dialIn(out, "10.1.0.2:7", time.Second)
		}
		receiveUntil(t, int(n.NICs()[0].Tap[0].Fd()), want)
	}
	if err := n.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, _ := answers(); got != all {
		t.Errorf("answers after Close: %q; want %q", got, all)
	}
}

func listen(t *testing.T, ns netns, addr string) (l net.Listener) {
	t.Helper()
	ns.do(func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	})
	return l
}

func dialIn(ns netns, addr string, timeout time.Duration) error {
	return ns.Do(context.Background(), func() error {
		// An IP address: no other goroutine is started, and so no other thread.
		c, err := net.DialTimeout("tcp", addr, timeout)
		if err == nil {
			c.Close()
		}
		return err
	})
}

func TestUpdate(t *testing.T) {
	pod, out := peered(t)
	n := open(t, pod, network.Options{Spares: 2})
	if r := n.Request(); len(r.Interfaces) != 0 {
		t.Errorf("Request() of an empty namespace = %v", r)
	}
	nics := n.NICs()
	plug(pod, out, "eth0", "h0", "address 02:00:00:00:00:01 mtu 1400")
	pod.run("ip address add 10.1.0.2/24 dev eth0")
	if err := n.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	r := n.Request()
	if len(r.Interfaces) != 1 || r.Interfaces[0].Device != nics[0].MAC || r.Interfaces[0].Mac != "02:00:00:00:00:01" ||
		r.Interfaces[0].Name != "eth0" || r.Interfaces[0].Mtu != 1400 || len(r.Interfaces[0].Addresses) != 1 {
		t.Errorf("Request() after an arrival = %v; want eth0 on device %s", r, nics[0].MAC)
	}
	exchange(t, int(nics[0].Tap[0].Fd()), out.packetSocket("h0"))

	// More than there are spares: none is joined.
	plug(pod, out, "net1", "h1", "")
	plug(pod, out, "net2", "h2", "")
	before := pod.state()
	err := n.Update(t.Context())
	var late *network.LateInterfaceError
	if !errors.As(err, &late) || late.Interface != "net2" || late.Spares != 2 || !errdefs.IsResourceExhausted(err) {
		t.Errorf("Update() with two more for one spare = %v; want a LateInterfaceError about net2", err)
	}
	pod.same(before)

	pod.run("ip link del net2\nip link set eth0 mtu 1200")
	if err := n.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	exchange(t, int(nics[1].Tap[0].Fd()), out.packetSocket("h1"))
	if got := pod.run("ip -o link show dev vmrt-tap0"); !strings.Contains(got, "mtu 1200 ") {
		t.Errorf("tap after a change of MTU: %s", got)
	}
	if err := n.Update(t.Context()); err != nil {
		t.Errorf("Update() without changes = %v", err)
	}
}

// TestOpenRollback: what one interface makes impossible leaves the others as
// they were.
func TestOpenRollback(t *testing.T) {
	pod, _ := twoInterfaces(t)
	pod.run(`
		tc qdisc add dev net1 ingress
		tc filter add dev net1 parent ffff: protocol ip prio 1 u32 match u8 0 0 action mirred egress redirect dev eth0`)
	before, filter := pod.state(), pod.run("tc filter show dev net1 ingress")
	_, err := network.Open(t.Context(), pod, network.Options{Queues: 2})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "interface net1: somebody else filters") {
		t.Errorf("Open() = %v; want a failed precondition of net1", err)
	}
	pod.same(before)
	if got := pod.run("tc filter show dev net1 ingress"); got != filter {
		t.Errorf("filters of net1:\n%s\nwant:\n%s", got, filter)
	}
}

// TestOthersHook: an ingress hook that somebody has for other ends stays.
func TestOthersHook(t *testing.T) {
	pod, out := twoInterfaces(t)
	pod.run("tc qdisc add dev eth0 clsact")
	before := pod.state()
	n := open(t, pod, network.Options{})
	exchange(t, int(n.NICs()[0].Tap[0].Fd()), out.packetSocket("h0"))
	if err := n.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	pod.same(before)
}

// TestCrash: a process that dies without Close leaves hooks, and no taps. They
// stand in nobody's way, and Clean removes them.
func TestCrash(t *testing.T) {
	pod, out := twoInterfaces(t)
	before := pod.state()
	crashed, err := network.Open(t.Context(), pod, network.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := network.Open(t.Context(), pod, network.Options{}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "another virtual machine is joined to it") {
		t.Errorf("second Open() = %v; want a failed precondition", err)
	}
	if got := taps(pod); got != 2 {
		t.Errorf("%d taps after a refused Open; want 2", got)
	}
	crashed.ReleaseFiles()
	if got := taps(pod); got != 0 {
		t.Errorf("%d taps with their files closed; want none", got)
	}
	next := open(t, pod, network.Options{})
	exchange(t, int(next.NICs()[0].Tap[0].Fd()), out.packetSocket("h0"))
	next.ReleaseFiles()
	if err := network.Clean(t.Context(), pod); err != nil {
		t.Errorf("Clean() = %v", err)
	}
	pod.run("ip link set eth0 allmulticast off\nip link set net1 allmulticast off")
	pod.same(before)
	if err := network.Clean(t.Context(), pod); err != nil {
		t.Errorf("second Clean() = %v", err)
	}
}

// TestInterfaceDeleted: the CNI may delete its interfaces before Close.
func TestInterfaceDeleted(t *testing.T) {
	pod, _ := twoInterfaces(t)
	n := open(t, pod, network.Options{})
	pod.run("ip link del eth0")
	if err := n.Update(t.Context()); err != nil {
		t.Errorf("Update() = %v", err)
	}
	if r := n.Request(); len(r.Interfaces) != 1 || r.Interfaces[0].Name != "net1" {
		t.Errorf("Request() = %v; want net1 alone", r)
	}
	if err := n.Close(t.Context()); err != nil {
		t.Errorf("Close() = %v", err)
	}
	if got := taps(pod); got != 0 {
		t.Errorf("%d taps after Close; want none", got)
	}
}

// TestInterfaceReplaced: the number of an interface that was deleted may be the
// next one's.
func TestInterfaceReplaced(t *testing.T) {
	pod, out := peered(t)
	plugIn := func(options string) {
		pod.run("ip link add name eth0 index 77 " + options + " type veth peer name far\nip link set far netns " + out.NetPath())
		out.up("far")
		pod.up("eth0")
	}
	plugIn("")
	n := open(t, pod, network.Options{})
	pod.run("ip link del eth0")
	plugIn("address 02:00:00:00:00:33 mtu 65535")
	if err := n.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r := n.Request(); len(r.Interfaces) != 1 || r.Interfaces[0].Mac != "02:00:00:00:00:33" || r.Interfaces[0].Device != n.NICs()[0].MAC {
		t.Errorf("Request() = %v; want the new eth0 on the old device", r)
	}
	exchange(t, int(n.NICs()[0].Tap[0].Fd()), out.packetSocket("far"))
}

// TestSameAddress: interfaces of different networks may share a hardware
// address; their devices do not.
func TestSameAddress(t *testing.T) {
	pod, out := peered(t)
	plug(pod, out, "eth0", "h0", "address 02:00:00:00:00:01")
	plug(pod, out, "net1", "h1", "address 02:00:00:00:00:01")
	n := open(t, pod, network.Options{})
	r := n.Request()
	if r.Interfaces[0].Device == r.Interfaces[1].Device || r.Interfaces[0].Mac != r.Interfaces[1].Mac {
		t.Errorf("Request() = %v; want two devices with one address", r)
	}
}

// TestMacvlan: multicast, which IPv6 needs, comes through as well.
func TestMacvlan(t *testing.T) {
	pod, out := peered(t)
	out.run("ip link add name p0 type veth peer name p1\nip link add link p0 name m0 type macvlan mode bridge")
	out.run("ip link set m0 netns " + pod.NetPath() + " name eth0")
	out.up("p0")
	out.up("p1")
	pod.up("eth0")
	eventually(t, "IPv6 of eth0", func() bool {
		out := pod.run("ip -6 address show dev eth0")
		return strings.Contains(out, "fe80::") && !strings.Contains(out, "tentative")
	})
	before := pod.state()
	n := open(t, pod, network.Options{})
	tap, far := int(n.NICs()[0].Tap[0].Fd()), out.packetSocket("p1")
	exchange(t, tap, far)
	f := frame("multicast")
	copy(f, []byte{0x33, 0x33, 1, 2, 3, 4})
	if _, err := unix.Write(far, f); err != nil {
		t.Fatal(err)
	}
	if got := receive(t, tap); got != "multicast" {
		t.Errorf("the tap has received %q; want multicast", got)
	}
	if err := n.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	pod.same(before)
}

func TestRequest(t *testing.T) {
	pod, _ := twoInterfaces(t)
	pod.run(`
		ip neigh add 10.1.0.1 lladdr 02:00:00:00:01:01 dev eth0 nud permanent
		ip rule add from 10.2.0.2/32 table 100 priority 1000
		ip route add 10.7.0.0/16 via inet6 fe80::1 dev eth0`)
	r := open(t, pod, network.Options{}).Request()
	if len(r.Interfaces) != 2 || len(r.Routes) != 2 || len(r.Neighbours) != 1 || len(r.Rules) != 1 {
		t.Fatalf("Request() = %v; want 2 interfaces, 2 routes, a neighbour and a rule", r)
	}
	i := r.Interfaces[0]
	if i.Name != "eth0" || i.Device != i.Mac || i.Mac != "02:00:00:00:00:01" || i.Mtu != 1400 || i.Down || len(i.Addresses) != 2 {
		t.Errorf("interface = %v", i)
	}
	for _, route := range r.Routes {
		if route.Source != "" || route.Table != unix.RT_TABLE_MAIN || len(route.Hops) != 1 || route.Hops[0].Interface != "eth0" {
			t.Errorf("route = %v", route)
		}
	}
	if n := r.Neighbours[0]; n.Interface != "eth0" || n.Address != "10.1.0.1" || n.Mac != "02:00:00:00:01:01" {
		t.Errorf("neighbour = %v", n)
	}
	if rule := r.Rules[0]; rule.Source != "10.2.0.2/32" || rule.Destination != "" || rule.Table != 100 || rule.Priority != 1000 || rule.Suppress != 0 {
		t.Errorf("rule = %v", rule)
	}
}
