//go:build linux

package network_test

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/network"
	"github.com/vmrt/vmrt/pkg/podns"
)

func mac(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

// TestScan reads what CNI plugins make: bridge with two families, ptp with its
// own routes, sbr with rules and a table, an interface without addresses.
func TestScan(t *testing.T) {
	pod, out := peered(t)
	plug(pod, out, "eth0", "h0", "address 02:00:00:00:00:01 mtu 1400")
	plug(pod, out, "net1", "h1", "address 02:00:00:00:00:02 mtu 9000")
	plug(pod, out, "bare", "h2", "address 02:00:00:00:00:03")
	pod.run(`
		ip address add 10.1.0.2/24 brd 10.1.0.255 dev eth0
		ip address add fd00:1::2/64 dev eth0 nodad
		ip address add fe80::77/64 dev eth0 nodad
		ip address add 10.2.0.2/24 dev net1
		ip address add 192.0.2.1 peer 192.0.2.2/32 dev net1
		ip route del 10.2.0.0/24 dev net1
		ip route add 10.2.0.1 dev net1 scope link src 10.2.0.2
		ip route add 10.2.0.0/24 via 10.2.0.1 dev net1 src 10.2.0.2
		ip route add default via 10.1.0.1 dev eth0
		ip -6 route add default via fd00:1::1 dev eth0 metric 7
		ip route add 10.9.0.0/16 via 169.254.1.1 dev eth0 onlink mtu 1300 metric 5
		ip route add 10.8.0.0/16 nexthop via 10.1.0.1 dev eth0 weight 1 nexthop via 10.1.0.3 dev eth0 weight 3
		ip route add 10.7.0.0/16 via inet6 fe80::1 dev eth0
		ip route add blackhole 10.6.0.0/16
		ip route add default via 10.2.0.1 dev net1 table 100
		ip rule add from 10.2.0.2/32 table 100 priority 1000
		ip -6 rule add fwmark 0x10/0xff iif eth0 table 200 priority 2000
		ip neigh add 10.1.0.1 lladdr 02:00:00:00:01:01 dev eth0 nud permanent
		ip neigh add fd00:1::1 lladdr 02:00:00:00:01:01 dev eth0 nud permanent
		ip neigh add 10.1.0.9 lladdr 02:00:00:00:01:09 dev eth0 nud stale
		sysctl -qw net.ipv6.conf.eth0.accept_ra=0
		sysctl -qw net.ipv6.conf.net1.disable_ipv6=1`)
	got, err := network.Scan(t.Context(), pod)
	if err != nil {
		t.Fatal(err)
	}
	p, a := netip.MustParsePrefix, netip.MustParseAddr
	hop := func(dev, via string) []network.Hop {
		h := network.Hop{Interface: dev, Weight: 1}
		if via != "" {
			h.Gateway = a(via)
		}
		return []network.Hop{h}
	}
	route := func(dst string, hops []network.Hop) network.Route {
		r := network.Route{Destination: p(dst), Hops: hops, Type: unix.RTN_UNICAST, Protocol: unix.RTPROT_BOOT, Table: unix.RT_TABLE_MAIN}
		return r
	}
	with := func(r network.Route, edit func(*network.Route)) network.Route {
		edit(&r)
		return r
	}
	want := &network.Config{
		Interfaces: []network.Interface{
			{Name: "eth0", Kind: "veth", MAC: mac("02:00:00:00:00:01"), MTU: 1400, Up: true, Addresses: []network.Address{
				{Prefix: p("10.1.0.2/24"), Broadcast: a("10.1.0.255")},
				{Prefix: p("fd00:1::2/64")},
				{Prefix: p("fe80::77/64"), Scope: unix.RT_SCOPE_LINK},
			}},
			{Name: "net1", Kind: "veth", MAC: mac("02:00:00:00:00:02"), MTU: 9000, Up: true, AcceptRA: 1, DisableIPv6: true, Addresses: []network.Address{
				{Prefix: p("10.2.0.2/24"), NoPrefixRoute: true},
				{Prefix: p("192.0.2.1/32"), Peer: p("192.0.2.2/32")},
			}},
			{Name: "bare", Kind: "veth", MAC: mac("02:00:00:00:00:03"), MTU: 1500, Up: true, AcceptRA: 1},
		},
		Routes: []network.Route{
			with(route("10.2.0.1/32", hop("net1", "")), func(r *network.Route) { r.Scope = unix.RT_SCOPE_LINK; r.Source = a("10.2.0.2") }),
			with(route("10.6.0.0/16", nil), func(r *network.Route) { r.Type = unix.RTN_BLACKHOLE }),
			with(route("10.9.0.0/16", hop("eth0", "169.254.1.1")), func(r *network.Route) { r.Hops[0].OnLink = true; r.MTU = 1300; r.Metric = 5 }),
			with(route("10.2.0.0/24", hop("net1", "10.2.0.1")), func(r *network.Route) { r.Source = a("10.2.0.2") }),
			route("0.0.0.0/0", hop("eth0", "10.1.0.1")),
			with(route("::/0", hop("eth0", "fd00:1::1")), func(r *network.Route) { r.Metric = 7 }),
			route("10.8.0.0/16", []network.Hop{
				{Interface: "eth0", Gateway: a("10.1.0.1"), Weight: 1}, {Interface: "eth0", Gateway: a("10.1.0.3"), Weight: 3},
			}),
			route("10.7.0.0/16", hop("eth0", "fe80::1")),
			with(route("0.0.0.0/0", hop("net1", "10.2.0.1")), func(r *network.Route) { r.Table = 100 }),
		},
		Neighbours: []network.Neighbour{
			{Interface: "eth0", Address: a("10.1.0.1"), MAC: mac("02:00:00:00:01:01")},
			{Interface: "eth0", Address: a("fd00:1::1"), MAC: mac("02:00:00:00:01:01")},
		},
		Rules: []network.Rule{
			{Priority: 1000, Source: p("10.2.0.2/32"), Table: 100},
			{IPv6: true, Priority: 2000, Mark: 0x10, Mask: 0xff, Input: "eth0", Table: 200},
		},
	}
	less := func(a, b network.Route) bool {
		return a.Destination.String()+a.Source.String() < b.Destination.String()+b.Source.String() || a.Table < b.Table
	}
	opts := cmp.Options{
		comparePrefixes, cmpopts.IgnoreFields(network.Interface{}, "Index"),
		cmpopts.SortSlices(less),
		cmpopts.SortSlices(func(a, b network.Address) bool { return a.Prefix.String() < b.Prefix.String() }),
		cmpopts.SortSlices(func(a, b network.Neighbour) bool { return a.Address.Less(b.Address) }),
	}
	if diff := cmp.Diff(want, got, opts); diff != "" {
		t.Errorf("Scan() differs (-want +got):\n%s", diff)
	}
	direct := 0
	for i, r := range got.Routes {
		if len(r.Hops) == 0 || !r.Hops[0].Gateway.IsValid() || r.Hops[0].OnLink {
			if i != direct {
				t.Errorf("route %d, to %s, needs no gateway and comes behind one that does", i, r.Destination)
			}
			direct++
		}
	}
}

// TestScanFiltersKernelAddresses: what the guest's kernel makes by itself is
// not carried over.
func TestScanFiltersKernelAddresses(t *testing.T) {
	pod, out := peered(t)
	plug(pod, out, "eth0", "h0", "")
	pod.run("ip address add fd00::5/64 dev eth0 valid_lft 1000 preferred_lft 1000")
	cfg, err := network.Scan(t.Context(), pod)
	if err != nil || len(cfg.Interfaces) != 1 {
		t.Fatalf("Scan() = %+v, %v; want one interface", cfg, err)
	}
	// eth0 accepts router announcements, so a temporary address is from one.
	if got := cfg.Interfaces[0].Addresses; got != nil {
		t.Errorf("addresses = %v; want none", got)
	}
	if len(cfg.Routes)+len(cfg.Neighbours)+len(cfg.Rules) != 0 {
		t.Errorf("Scan() = %+v; want no routes, neighbours and rules", cfg)
	}
}

func TestScanUnsupported(t *testing.T) {
	for _, tt := range []struct{ name, commands, object, reason string }{
		{"tun", "ip tuntap add dev tun0 mode tun\nip link set tun0 up", "interface tun0 (tuntap)", "belong to the program"},
		{"tap of another", "ip tuntap add dev tap5 mode tap\nip address add 10.0.0.1/24 dev tap5", "interface tap5 (tuntap)", "belong to the program"},
		{"below macvlan", "ip link add name p0 type veth peer name p1\nip link add link p0 name m0 type macvlan mode bridge\nip link set p0 up\nip link set m0 up", "interface p0 (veth)", "interface m0 is on top of it"},
		{"rule", "ip rule add dport 53 table 7 priority 30", "routing rule 30", "looks at more"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			pod := newNetNS(t)
			pod.run(tt.commands)
			_, err := network.Scan(t.Context(), pod)
			var unsupported *network.UnsupportedError
			if !errors.As(err, &unsupported) || unsupported.Object != tt.object || !strings.Contains(unsupported.Reason, tt.reason) || !errdefs.IsFailedPrecondition(err) {
				t.Errorf("Scan() = %v; want an UnsupportedError about %s: %s", err, tt.object, tt.reason)
			}
			if n, err := network.Open(t.Context(), pod, network.Options{}); err == nil {
				n.Close(t.Context())
				t.Error("Open() = nil; want the same error")
			}
		})
	}
}

// TestScanIgnores: what nobody uses, and what is part of another interface, is
// neither an error nor for the guest.
func TestScanIgnores(t *testing.T) {
	pod := newNetNS(t)
	pod.run(`
		ip tuntap add dev tun0 mode tun
		ip link add name br0 type bridge
		ip link add name port type veth peer name far
		ip link set port master br0
		ip link set port up
		ip link set br0 up`)
	cfg, err := network.Scan(t.Context(), pod)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, i := range cfg.Interfaces {
		got = append(got, i.Name)
	}
	if diff := cmp.Diff([]string{"br0", "far"}, got); diff != "" {
		t.Errorf("interfaces (-want +got):\n%s", diff)
	}
}

func TestScanClosedNamespace(t *testing.T) {
	pod := newNetNS(t)
	pod.Close()
	if _, err := network.Scan(t.Context(), pod); !errors.Is(err, podns.ErrClosed) {
		t.Errorf("Scan() of a closed namespace = %v; want %v", err, podns.ErrClosed)
	}
}
