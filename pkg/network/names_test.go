//go:build linux

package network_test

import (
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/network"
)

// nameServer answers by UDP what it is asked, at an address of a namespace.
func nameServer(t *testing.T, ns netns, addr string) {
	t.Helper()
	var c net.PacketConn
	ns.do(func() (err error) {
		c, err = net.ListenPacket("udp4", addr)
		return err
	})
	t.Cleanup(func() { c.Close() })
	go func() {
		b := make([]byte, 1500)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			c.WriteTo(b[:n], from)
		}
	}()
}

// asks reports whether a process of the namespace gets an answer.
func asks(t *testing.T, ns netns, addr string) bool {
	t.Helper()
	var c net.Conn
	ns.do(func() (err error) {
		c, err = net.Dial("udp4", addr)
		return err
	})
	defer c.Close()
	b := make([]byte, 16)
	for range 3 { // what asks for the hardware address may be lost
		c.SetDeadline(time.Now().Add(500 * time.Millisecond))
		if _, err := c.Write([]byte("name")); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(b); err == nil && string(b[:n]) == "name" {
			return true
		}
	}
	return false
}

// What a name server in the pod's namespace is told by others passes, and
// nothing else does: the host answers neither ARP nor the guest's ports.
func TestPassNames(t *testing.T) {
	pod, out := twoInterfaces(t)
	nameServer(t, out, "10.1.0.1:53")
	nameServer(t, out, "10.1.0.1:54")
	settings := func() string {
		return pod.run("sysctl net.ipv4.ip_local_port_range net.ipv4.conf.eth0.arp_ignore net.ipv4.conf.net1.arp_ignore")
	}
	before, set := pod.state(), settings()
	n := open(t, pod, network.Options{Spares: 1})
	if asks(t, pod, "10.1.0.1:53") {
		t.Error("a name server outside answers before PassNames; want the answer with the guest")
	}
	for range 2 { // it is idempotent
		if err := n.PassNames(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if !asks(t, pod, "10.1.0.1:53") {
		t.Error("a name server outside does not answer after PassNames")
	}
	if asks(t, pod, "10.1.0.1:54") {
		t.Error("another port answers; want that with the guest")
	}
	if _, err := out.try("busybox ping -c 1 -W 1 10.1.0.2"); err == nil {
		t.Error("the host answers ping")
	}
	out.try("ip neigh flush dev h0")
	tap := int(n.NICs()[0].Tap[0].Fd())
	out.try("busybox ping -c 1 -W 1 10.1.0.2")
	receiveUntil(t, tap, func(f []byte) bool { return f[12] == 8 && f[13] == 6 && f[21] == 1 }) // an ARP request
	if got, err := out.try("ip neigh show 10.1.0.2 dev h0"); err == nil && strings.Contains(got, "REACHABLE") {
		t.Errorf("the host answers ARP: %s", got)
	}

	// The guest's own questions are answered to the guest.
	out.run("ip neigh replace 10.1.0.2 lladdr 02:00:00:00:00:01 dev h0")
	out.do(func() error {
		c, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.IPv4(10, 1, 0, 1), Port: 5300}, &net.UDPAddr{IP: net.IPv4(10, 1, 0, 2), Port: 64512})
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("for the guest"))
		return err
	})
	receiveUntil(t, tap, func(f []byte) bool {
		return f[12] == 8 && f[13] == 0 && f[23] == unix.IPPROTO_UDP && strings.Contains(string(f), "for the guest")
	})

	// An interface that arrives is like the others.
	plug(pod, out, "eth2", "h2", "")
	pod.run("ip address add 10.9.0.2/24 dev eth2")
	out.run("ip address add 10.9.0.1/24 dev h2")
	nameServer(t, out, "10.9.0.1:53")
	if err := n.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !asks(t, pod, "10.9.0.1:53") {
		t.Error("a name server by the new interface does not answer")
	}
	pod.run("ip link del eth2")
	if err := n.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	pod.same(before)
	if got := settings(); got != set {
		t.Errorf("settings after Close = %q; want %q", got, set)
	}
	if !asks(t, pod, "10.1.0.1:53") {
		t.Error("a name server outside does not answer after Close")
	}
}

// What a shim that was killed has left goes with Clean, or with the next Open.
func TestPassNamesLeft(t *testing.T) {
	pod, _ := twoInterfaces(t)
	before := pod.state()
	n := open(t, pod, network.Options{})
	if err := n.PassNames(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.ReleaseFiles() // which removes the taps, as their process's end does
	if err := network.Clean(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	pod.run("ip link set eth0 allmulticast off\nip link set net1 allmulticast off")
	pod.same(before)
	if err := n.Close(t.Context()); err != nil {
		t.Error(err)
	}
}
