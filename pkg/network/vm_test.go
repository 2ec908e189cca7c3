//go:build linux

package network_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/tests/probe"
)

// port is where every probe serves, on every address.
const port = 7000

// end is one end of a network: a container of a virtual machine, or a
// namespace of the host.
type end interface {
	Serve() error
	Send(addr string, bytes int64) (time.Duration, error)
	Fill(addr string, bytes int64) error
	RoundTrips(x probe.Exchange) (time.Duration, error)
}

func (m *machine) Serve() error {
	return m.Call("Serve", fmt.Sprintf(":%d", port), &struct{}{})
}

func (m *machine) Send(addr string, bytes int64) (took time.Duration, err error) {
	err = m.Call("Send", probe.Transfer{Addr: addr, Bytes: bytes}, &took)
	return took, err
}

func (m *machine) Fill(addr string, bytes int64) error {
	return m.Call("Fill", probe.Transfer{Addr: addr, Bytes: bytes}, &struct{}{})
}

func (m *machine) RoundTrips(x probe.Exchange) (median time.Duration, err error) {
	err = m.Call("RoundTrips", x, &median)
	return median, err
}

// host is the probe in a namespace of the host.
type host struct{ p probe.Probe }

func hostEnd(n netns) *host {
	h := &host{probe.Probe{Inside: func(f func() error) error { return n.Do(context.Background(), f) }}}
	n.t.Cleanup(h.p.Close)
	return h
}

func (h *host) Serve() error { return h.p.Serve(fmt.Sprintf(":%d", port), nil) }

func (h *host) Send(addr string, bytes int64) (took time.Duration, err error) {
	err = h.p.Send(probe.Transfer{Addr: addr, Bytes: bytes}, &took)
	return took, err
}

func (h *host) Fill(addr string, bytes int64) error {
	return h.p.Fill(probe.Transfer{Addr: addr, Bytes: bytes}, nil)
}

func (h *host) RoundTrips(x probe.Exchange) (median time.Duration, err error) {
	err = h.p.RoundTrips(x, &median)
	return median, err
}

func addr(ip string) string {
	if strings.Contains(ip, ":") {
		return fmt.Sprintf("[%s]:%d", ip, port)
	}
	return fmt.Sprintf("%s:%d", ip, port)
}

// The networks of the tests: a bridge with frames of 1500 bytes and one with
// 9000, each with the pods' addresses ending in their number and the host's in
// 1.
func bridges(out netns) {
	out.t.Helper()
	for i, mtu := range []int{1500, 9000} {
		br := fmt.Sprintf("br%d", i)
		out.run(fmt.Sprintf(`
			ip link add name %[1]s type bridge
			ip link set %[1]s mtu %[2]d`, br, mtu))
		out.up(br)
		out.run(fmt.Sprintf("ip address add 10.%[1]d.0.1/24 dev br%[2]d\nip address add fd00:%[1]d::1/64 dev br%[2]d nodad", i+1, i))
	}
}

// addPod makes a namespace with an interface on each bridge, as a CNI would,
// in an order that is not that of the names.
func addPod(t testing.TB, out netns, number int) netns {
	t.Helper()
	pod := newNetNS(t)
	for _, i := range []int{1, 0} {
		attach(pod, out, []string{"eth0", "net1"}[i], i, number)
	}
	pod.run("ip route add default via 10.1.0.1 dev eth0\nip -6 route add default via fd00:1::1 dev eth0")
	return pod
}

// attach makes one interface of a pod, on bridge i.
func attach(pod, out netns, name string, i, number int) {
	pod.t.Helper()
	far := fmt.Sprintf("p%d-%d", number, i)
	mtu := []int{1500, 9000}[i]
	plug(pod, out, name, far, fmt.Sprintf("address 02:00:00:00:%02x:%02x mtu %d", i, number, mtu))
	out.run(fmt.Sprintf("ip link set %s mtu %d master br%d", far, mtu, i))
	pod.run(fmt.Sprintf("ip address add 10.%[1]d.0.%[2]d/24 dev %[3]s\nip address add fd00:%[1]d::%[2]d/64 dev %[3]s nodad", i+1, number, name))
}

// vmTest skips what -short is without.
func vmTest(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("boots virtual machines, which -short is without")
	}
}

// TestVMPods has two pods on two bridges talk to each other and to the host.
func TestVMPods(t *testing.T) {
	vmTest(t)
	out := newNetNS(t)
	bridges(out)
	pods := []netns{addPod(t, out, 2), addPod(t, out, 3)}
	// What the sbr plugin makes, and a neighbour.
	pods[0].run(`
		ip rule add from 10.2.0.2 table 100 priority 1000
		ip route add 10.2.0.0/24 dev net1 src 10.2.0.2 table 100
		ip route add default via 10.2.0.1 dev net1 table 100
		ip neigh add 10.1.0.99 lladdr 02:00:00:00:09:09 dev eth0 nud permanent`)
	a := boot(t, pods[0], machineSpec{cpus: 2, cmdline: []string{"maxcpus=1"}})
	b := boot(t, pods[1], machineSpec{})
	h := hostEnd(out)
	for _, e := range []end{a, b, h} {
		if err := e.Serve(); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("View", func(t *testing.T) { testView(t, a) })
	t.Run("Queues", func(t *testing.T) { testQueues(t, a) })
	for _, tt := range []struct {
		name     string
		from, to end
		number   int // of the pod that serves
	}{{"PodToHost", a, h, 1}, {"HostToPod", h, a, 2}, {"PodToPod", a, b, 3}, {"AndBack", b, a, 2}} {
		t.Run(tt.name, func(t *testing.T) { testTraffic(t, tt.from, tt.to, tt.number) })
	}
}

// testView compares what a container sees with what a container without a
// virtual machine would.
func testView(t *testing.T, m *machine) {
	// As root of the container would with busybox, and without it.
	for _, command := range []string{"ip route", "ip -6 route show table main", "ip route show table 100", "ip rule"} {
		want := normal(m.pod.run("busybox " + command))
		if diff := cmp.Diff(want, normal(m.run(command))); diff != "" {
			t.Errorf("%s (-host +guest):\n%s", command, diff)
		}
	}
	addresses := m.run("ip address")
	if strings.Contains(m.run("ip -6 address show scope global"), "tentative") || strings.Contains(addresses, "vmrt") {
		t.Errorf("ip address:\n%s", addresses)
	}
	for _, want := range []string{
		": lo: <LOOPBACK,UP", "inet 127.0.0.1/8", "inet6 ::1/128",
		": net1: ", "mtu 9000", "02:00:00:00:01:02", "inet 10.2.0.2/24", "inet6 fd00:2::2/64",
		": eth0: ", "mtu 1500", "02:00:00:00:00:02", "inet 10.1.0.2/24", "inet6 fd00:1::2/64",
	} {
		_, after, ok := strings.Cut(addresses, want)
		if !ok {
			t.Fatalf("no %q in what is left of ip address: %s", want, addresses)
		}
		if strings.HasPrefix(want, ":") || strings.HasPrefix(want, "mtu") {
			addresses = after
		}
	}
	if got := m.run("cat /proc/net/arp"); !strings.Contains(got, "02:00:00:00:09:09") {
		t.Errorf("no permanent neighbour in\n%s", got)
	}
	if got := strings.Fields(m.run("ls /sys/class/net")); len(got) != 3 {
		t.Errorf("interfaces = %v; want eth0, lo and net1", got)
	}
}

// normal sorts lines and drops what the kernels write differently: routes of
// the host's link-local addresses are as many as the guest's, in another order.
func normal(out string) []string {
	var lines []string
	for line := range strings.Lines(out) {
		lines = append(lines, strings.Join(strings.Fields(line), " "))
	}
	slices.Sort(lines)
	return lines
}

func testQueues(t *testing.T, m *machine) {
	for _, n := range []uint32{1, 2} {
		if _, err := m.agent.OnlineCPUs(t.Context(), &api.OnlineCPUsRequest{Count: n}); err != nil {
			t.Fatal(err)
		}
		if got := strings.Count(m.run("ls /sys/class/net/eth0/queues"), "tx-"); got != int(n) {
			t.Errorf("%d queues for %d CPUs; want as many", got, n)
		}
	}
}

// testTraffic sends what goes wrong first between two ends, over both bridges.
func testTraffic(t *testing.T, from, to end, number int) {
	for _, ip := range []string{"10.1.0", "fd00:1:", "10.2.0", "fd00:2:"} {
		dst := addr(strings.ReplaceAll(fmt.Sprintf("%s.%d", ip, number), ":.", "::"))
		t.Run(ip, func(t *testing.T) {
			for _, x := range []probe.Exchange{
				{Network: "tcp", Size: 1, Count: 3},
				{Network: "tcp", Size: 100_000, Count: 3},
				{Network: "udp", Size: 1, Count: 3},
				{Network: "udp", Size: 1472, Count: 3},
				{Network: "udp", Size: 8952, Count: 3},
				{Network: "udp", Size: 65507, Count: 3}, // 64 KiB with headers
			} {
				x.Addr = dst
				took, err := from.RoundTrips(x)
				if err != nil {
					t.Errorf("round trip: %v", err)
				}
				t.Logf("%s, %d bytes: %v", x.Network, x.Size, took)
			}
			const size = 8 << 20
			took, err := from.Send(dst, size)
			if err != nil {
				t.Errorf("send %d bytes: %v", size, err)
			}
			t.Logf("TCP: %.0f MB/s", size/1e6/took.Seconds())
		})
	}
	// The largest packets that pass in one piece, and no larger one.
	for net, largest := range []int{1472, 8972} {
		x := probe.Exchange{Network: "udp", Addr: addr(fmt.Sprintf("10.%d.0.%d", net+1, number)), Count: 1, Whole: true, Size: largest}
		if _, err := from.RoundTrips(x); err != nil {
			t.Errorf("a packet of %d bytes in one piece: %v", x.Size, err)
		}
		x.Size++
		if _, err := from.RoundTrips(x); err == nil || !strings.Contains(err.Error(), "message too long") {
			t.Errorf("a packet of %d bytes in one piece = %v; want message too long", x.Size, err)
		}
	}
}

// TestVMSpare: interfaces that arrive after the boot. Until then there is
// nothing to see of their devices.
func TestVMSpare(t *testing.T) {
	vmTest(t)
	for _, kind := range []string{guest.Tuned, guest.Stock} {
		t.Run(kind, func(t *testing.T) {
			out := newNetNS(t)
			bridges(out)
			pod := newNetNS(t)
			m := boot(t, pod, machineSpec{kind: kind, spares: 2})
			if got := strings.Fields(m.run("ls /sys/class/net")); len(got) != 1 || got[0] != "lo" {
				t.Errorf("interfaces = %v; want lo alone", got)
			}
			h := hostEnd(out)
			for _, e := range []end{h, m} {
				if err := e.Serve(); err != nil {
					t.Fatal(err)
				}
			}
			for i, name := range []string{"eth0", "net1"} {
				attach(pod, out, name, i, 5)
				if err := m.net.Update(t.Context()); err != nil {
					t.Fatal(err)
				}
				m.configure(t.Context())
				if got := m.run("ip link show " + name); !strings.Contains(got, fmt.Sprintf("02:00:00:00:%02x:05", i)) || !strings.Contains(got, []string{"mtu 1500", "mtu 9000"}[i]) {
					t.Errorf("%s: %s", name, got)
				}
				if got := strings.Fields(m.run("ls /sys/class/net")); len(got) != i+2 {
					t.Errorf("interfaces = %v; want %d", got, i+2)
				}
				testBriefly(t, m, h, fmt.Sprintf("10.%d.0.1", i+1))
				testBriefly(t, h, m, fmt.Sprintf("fd00:%d::5", i+1))
			}
		})
	}
}

// testBriefly is a short testTraffic.
func testBriefly(t *testing.T, from, to end, ip string) {
	t.Helper()
	for _, x := range []probe.Exchange{{Network: "tcp", Size: 100_000, Count: 3}, {Network: "udp", Size: 65507, Count: 3}} {
		x.Addr = addr(ip)
		if _, err := from.RoundTrips(x); err != nil {
			t.Errorf("round trip: %v", err)
		}
	}
}

// BenchmarkVMNetwork measures from one pod to the next across a bridge, and
// between two namespaces without virtual machines on the same bridge.
func BenchmarkVMNetwork(b *testing.B) {
	vmTest(b)
	out := newNetNS(b)
	bridges(out)
	plain := []netns{addPod(b, out, 4), addPod(b, out, 5)}
	first, second := boot(b, addPod(b, out, 2), machineSpec{}), boot(b, addPod(b, out, 3), machineSpec{})
	for _, bb := range []struct {
		name     string
		from, to end
		number   int
	}{{"veth", hostEnd(plain[0]), hostEnd(plain[1]), 5}, {"pods", first, second, 3}} {
		if err := bb.to.Serve(); err != nil {
			b.Fatal(err)
		}
		for i, mtu := range []int{1500, 9000} {
			dst := addr(fmt.Sprintf("10.%d.0.%d", i+1, bb.number))
			b.Run(fmt.Sprintf("Throughput/mtu=%d/%s", mtu, bb.name), func(b *testing.B) {
				const size = 64 << 20
				b.SetBytes(size)
				for b.Loop() {
					if err := bb.from.Fill(dst, size); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
		for _, network := range []string{"tcp", "udp"} {
			b.Run("RoundTrip/"+network+"/"+bb.name, func(b *testing.B) {
				var total time.Duration
				for b.Loop() {
					took, err := bb.from.RoundTrips(probe.Exchange{Network: network, Addr: addr(fmt.Sprintf("10.1.0.%d", bb.number)), Size: 64, Count: 500})
					if err != nil {
						b.Fatal(err)
					}
					total += took
				}
				b.ReportMetric(float64(total.Microseconds())/float64(b.N), "us/median")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}
