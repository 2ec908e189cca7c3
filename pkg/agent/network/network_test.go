package network_test

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/agent/network"
	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/podns/podnstest"
)

func TestMain(m *testing.M) { podnstest.Main(m, nil) }

// machine is a network namespace that stands in for a virtual machine; its
// devices are ends of veth pairs.
type machine struct {
	*podns.Namespaces
	t *testing.T
	network.Network
}

// newMachine has n devices, with hardware addresses 02:00:00:00:00:0N from 1.
// Their far ends are up, and called farN.
func newMachine(t *testing.T, n int) *machine {
	t.Helper()
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skipf("needs iproute2: %v", err)
	}
	m := &machine{Namespaces: podnstest.Open(t, podns.Config{}), t: t}
	for i := 1; i <= n; i++ {
		m.run(fmt.Sprintf("ip link add name eth%d address %s type veth peer name far%d", i-1, device(i), i))
		m.run(fmt.Sprintf("sysctl -qw net.ipv6.conf.far%d.disable_ipv6=1", i))
		m.run(fmt.Sprintf("ip link set far%d up", i))
	}
	return m
}

func device(n int) string { return fmt.Sprintf("02:00:00:00:00:%02x", n) }

func (m *machine) run(command string) string {
	m.t.Helper()
	var out bytes.Buffer
	args := strings.Fields(command)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := m.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		m.t.Fatalf("%s: %v\n%s", command, err, &out)
	}
	return out.String()
}

func (m *machine) configure(c *api.NetworkConfig) error {
	return m.Do(m.t.Context(), func() error { return m.Configure(c) })
}

func (m *machine) mustConfigure(c *api.NetworkConfig) {
	m.t.Helper()
	if err := m.configure(c); err != nil {
		m.t.Fatalf("Configure() = %v", err)
	}
}

// want checks that the output of each command has the words, in order.
func (m *machine) want(command string, words ...string) {
	m.t.Helper()
	out := m.run(command)
	rest := out
	for _, w := range words {
		_, after, ok := strings.Cut(rest, w)
		if !ok {
			m.t.Errorf("%s: want %q in\n%s", command, words, out)
			return
		}
		rest = after
	}
}

func (m *machine) state() string {
	m.t.Helper()
	var b strings.Builder
	for _, c := range []string{"ip -d link", "ip address", "ip route show table all", "ip -6 route show table all", "ip rule", "ip -6 rule", "ip neigh show nud permanent"} {
		b.WriteString("# " + c + "\n" + m.run(c))
	}
	return b.String()
}

func iface(dev int, name string, addresses ...string) *api.NetworkInterface {
	i := &api.NetworkInterface{Device: device(dev), Name: name, Mac: device(dev), Mtu: 1500}
	for _, a := range addresses {
		i.Addresses = append(i.Addresses, &api.NetworkAddress{Prefix: a})
	}
	return i
}

func route(dst, dev, via string) *api.NetworkRoute {
	return &api.NetworkRoute{
		Destination: dst, Hops: []*api.NetworkHop{{Interface: dev, Gateway: via, Weight: 1}},
		Type: unix.RTN_UNICAST, Protocol: unix.RTPROT_BOOT, Table: unix.RT_TABLE_MAIN,
	}
}

func edited[T any](v T, edit func(T)) T {
	edit(v)
	return v
}

// full is a configuration with something of everything.
func full() *api.NetworkConfig {
	return &api.NetworkConfig{
		Interfaces: []*api.NetworkInterface{
			edited(iface(1, "eth0", "10.1.0.2/24", "fd00:1::2/64"), func(i *api.NetworkInterface) {
				i.Mtu = 1400
				i.Mac = "02:00:00:00:00:77"
				i.Addresses[0].Broadcast = "10.1.0.255"
			}),
			// As the ptp plugin has it: the subnet is behind the gateway.
			edited(iface(2, "net1", "10.2.0.2/24"), func(i *api.NetworkInterface) {
				i.Addresses[0].NoPrefixRoute = true
				i.Mtu = 9000
				i.DisableIpv6 = true
			}),
			edited(iface(3, "v6", "fd00:3::2/64"), func(i *api.NetworkInterface) {
				i.AcceptRa = 2
				i.Addresses = append(i.Addresses, &api.NetworkAddress{Prefix: "192.0.2.1/32", Peer: "192.0.2.2/32"})
			}),
			edited(iface(4, "off"), func(i *api.NetworkInterface) { i.Down = true }),
		},
		Routes: []*api.NetworkRoute{
			edited(route("10.2.0.1/32", "net1", ""), func(r *api.NetworkRoute) { r.Scope = unix.RT_SCOPE_LINK; r.Source = "10.2.0.2" }),
			edited(route("10.9.0.0/16", "eth0", "169.254.1.1"), func(r *api.NetworkRoute) { r.Hops[0].Onlink = true; r.Mtu = 1300; r.Metric = 5 }),
			{Destination: "10.6.0.0/16", Type: unix.RTN_BLACKHOLE, Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_BOOT},
			route("10.2.0.0/24", "net1", "10.2.0.1"),
			route("0.0.0.0/0", "eth0", "10.1.0.1"),
			edited(route("::/0", "eth0", "fd00:1::1"), func(r *api.NetworkRoute) { r.Metric = 7 }),
			edited(route("10.8.0.0/16", "eth0", "10.1.0.1"), func(r *api.NetworkRoute) {
				r.Hops = append(r.Hops, &api.NetworkHop{Interface: "eth0", Gateway: "10.1.0.3", Weight: 3})
			}),
			route("10.7.0.0/16", "eth0", "fe80::1"),
			edited(route("0.0.0.0/0", "net1", "10.2.0.1"), func(r *api.NetworkRoute) { r.Table = 1000 }),
		},
		Neighbours: []*api.NetworkNeighbour{
			{Interface: "eth0", Address: "10.1.0.1", Mac: "02:00:00:00:01:01"},
			{Interface: "eth0", Address: "fd00:1::1", Mac: "02:00:00:00:01:01"},
		},
		Rules: []*api.NetworkRule{
			{Priority: 1000, Source: "10.2.0.2/32", Table: 1000},
			{Ipv6: true, Priority: 2000, Mark: 0x10, Mask: 0xff, Input: "eth0", Table: 200, Suppress: 1},
		},
	}
}

func TestConfigure(t *testing.T) {
	m := newMachine(t, 4)
	m.run("ip link set lo down")
	m.mustConfigure(full())
	m.want("ip -o link show lo", "UP")
	m.want("ip -o link show eth0", "UP", "mtu 1400", "02:00:00:00:00:77")
	m.want("ip -o link show net1", "UP", "mtu 9000", "02:00:00:00:00:02")
	m.want("ip -o link show off", "state DOWN")
	m.want("ip address show dev eth0", "inet 10.1.0.2/24 brd 10.1.0.255 scope global eth0", "inet6 fd00:1::2/64 scope global nodad")
	m.want("ip address show dev net1", "inet 10.2.0.2/24 scope global noprefixroute net1")
	m.want("ip address show dev v6", "inet 192.0.2.1 peer 192.0.2.2/32", "inet6 fd00:3::2/64 scope global nodad")
	// The kernel gets to its own link-local addresses in its time.
	if out := m.run("ip -6 address show scope global"); strings.Contains(out, "tentative") {
		t.Errorf("addresses that cannot be used yet:\n%s", out)
	}
	if out := m.run("ip -6 address show dev net1"); out != "" {
		t.Errorf("IPv6 where it is disabled:\n%s", out)
	}
	m.want("cat /proc/sys/net/ipv6/conf/eth0/accept_ra", "0")
	m.want("cat /proc/sys/net/ipv6/conf/v6/accept_ra", "2")
	routes := m.run("ip route")
	for _, want := range []string{
		"default via 10.1.0.1 dev eth0 \n",
		"10.1.0.0/24 dev eth0 proto kernel scope link src 10.1.0.2 \n",
		"blackhole 10.6.0.0/16 \n",
		"10.9.0.0/16 via 169.254.1.1 dev eth0 metric 5 onlink mtu 1300 \n",
		"10.2.0.0/24 via 10.2.0.1 dev net1 \n",
		"10.2.0.1 dev net1 scope link src 10.2.0.2 \n",
		"10.7.0.0/16 via inet6 fe80::1 dev eth0 \n",
		"nexthop via 10.1.0.3 dev eth0 weight 3",
	} {
		if !strings.Contains(routes, want) {
			t.Errorf("want %q in\n%s", want, routes)
		}
	}
	if strings.Contains(routes, "10.2.0.0/24 dev net1") {
		t.Errorf("a route to the subnet that the pod does not have:\n%s", routes)
	}
	m.want("ip route show table 1000", "default via 10.2.0.1 dev net1")
	m.want("ip -6 route", "default via fd00:1::1 dev eth0 metric 7")
	m.want("ip neigh show nud permanent dev eth0", "10.1.0.1 lladdr 02:00:00:00:01:01 PERMANENT")
	m.want("ip -6 neigh show nud permanent dev eth0", "fd00:1::1 lladdr 02:00:00:00:01:01 PERMANENT")
	m.want("ip rule", "1000:	from 10.2.0.2 lookup 1000")
	m.want("ip -6 rule", "2000:	from all fwmark 0x10/0xff iif eth0 lookup 200 suppress_prefixlength 0")

	podnstest.Wait(t, "the link-local addresses to settle", func() bool { return !strings.Contains(m.run("ip -6 address"), "tentative") })
	before := m.state()
	m.mustConfigure(full())
	if diff := cmp.Diff(before, m.state()); diff != "" {
		t.Errorf("the same again has changed (-before +after):\n%s", diff)
	}
}

// TestLater: what arrives later is added to what is there.
func TestLater(t *testing.T) {
	m := newMachine(t, 2)
	m.mustConfigure(&api.NetworkConfig{
		Interfaces: []*api.NetworkInterface{iface(1, "eth0", "10.1.0.2/24")},
		Routes:     []*api.NetworkRoute{route("0.0.0.0/0", "eth0", "10.1.0.1")},
	})
	m.run("ip address add 10.99.0.1/24 dev eth0") // a container's own doing
	m.mustConfigure(&api.NetworkConfig{
		Interfaces: []*api.NetworkInterface{iface(1, "eth0", "10.1.0.2/24", "10.1.0.3/24"), iface(2, "eth5", "10.2.0.2/24")},
		Routes:     []*api.NetworkRoute{route("0.0.0.0/0", "eth0", "10.1.0.1"), route("10.3.0.0/24", "eth5", "10.2.0.1")},
	})
	m.want("ip address show dev eth0", "10.1.0.2/24", "10.99.0.1/24", "10.1.0.3/24")
	m.want("ip route", "default via 10.1.0.1 dev eth0", "10.3.0.0/24 via 10.2.0.1 dev eth5")
	m.want("ip -o link show eth5", "UP")
}

// TestNames: devices get their names whoever has them now.
func TestNames(t *testing.T) {
	m := newMachine(t, 3)
	m.run("ip link set eth1 up")
	m.mustConfigure(&api.NetworkConfig{Interfaces: []*api.NetworkInterface{iface(1, "eth1"), iface(2, "eth2"), iface(3, "eth0")}})
	for name, dev := range map[string]int{"eth1": 1, "eth2": 2, "eth0": 3} {
		m.want("ip -o link show "+name, "UP", device(dev))
	}
	// A name that a device has which is not configured.
	m = newMachine(t, 2)
	m.mustConfigure(&api.NetworkConfig{Interfaces: []*api.NetworkInterface{iface(2, "eth0")}})
	m.want("ip -o link show eth0", "UP", device(2))
	m.want("ip -o link show vmrt3", device(1))
}

func TestErrors(t *testing.T) {
	one := func(i *api.NetworkInterface) *api.NetworkConfig {
		return &api.NetworkConfig{Interfaces: []*api.NetworkInterface{i}}
	}
	with := func(edit func(c *api.NetworkConfig)) *api.NetworkConfig {
		c := one(iface(1, "eth0", "10.1.0.2/24"))
		edit(c)
		return c
	}
	bad := errdefs.ErrInvalidArgument
	for _, tt := range []struct {
		name string
		cfg  *api.NetworkConfig
		want string
		kind error
	}{
		{"no such device", one(iface(9, "eth0")), "interface eth0: device 02:00:00:00:00:09: not found", errdefs.ErrNotFound},
		{"no device", one(&api.NetworkInterface{Name: "eth0", Mac: device(1), Mtu: 1500}), `interface "eth0": device: hardware address ""`, bad},
		{"no name", one(iface(1, "")), `interface ""`, bad},
		{"long name", one(iface(1, "sixteenletters16")), `interface "sixteenletters16"`, bad},
		{"path as name", one(iface(1, "../x")), `interface "../x"`, bad},
		{"loopback", one(iface(1, "lo")), `interface "lo"`, bad},
		{"bad MAC", one(edited(iface(1, "eth0"), func(i *api.NetworkInterface) { i.Mac = "02:00" })), `hardware address "02:00"`, bad},
		{"group MAC", one(edited(iface(1, "eth0"), func(i *api.NetworkInterface) { i.Mac = "03:00:00:00:00:01" })), "interface eth0: set hardware address 03:00:00:00:00:01", unix.EADDRNOTAVAIL},
		{"no MTU", one(edited(iface(1, "eth0"), func(i *api.NetworkInterface) { i.Mtu = 0 })), "MTU 0", bad},
		{"large MTU", one(edited(iface(1, "eth0"), func(i *api.NetworkInterface) { i.Mtu = 1 << 31 })), "MTU 2147483648", bad},
		{"bad address", one(iface(1, "eth0", "10.1.0.2")), `interface "eth0": address "10.1.0.2"`, bad},
		{"bad peer", one(edited(iface(1, "eth0", "10.1.0.2/24"), func(i *api.NetworkInterface) { i.Addresses[0].Peer = "::1/128" })), `peer "::1/128"`, bad},
		{"group address", one(iface(1, "eth0", "ff02::1/64")), "interface eth0: add address ff02::1/64", unix.EADDRNOTAVAIL},
		{"twice", &api.NetworkConfig{Interfaces: []*api.NetworkInterface{iface(1, "a"), iface(2, "a")}}, `interface "a"`, bad},
		{"one device for two", &api.NetworkConfig{Interfaces: []*api.NetworkInterface{iface(1, "a"), iface(1, "b")}}, `interface "b"`, bad},
		{"bad route", with(func(c *api.NetworkConfig) { c.Routes = []*api.NetworkRoute{route("10.0.0.0", "eth0", "")} }), `route to "10.0.0.0"`, bad},
		{"bad gateway", with(func(c *api.NetworkConfig) { c.Routes = []*api.NetworkRoute{route("10.0.0.0/8", "eth0", "x")} }), `gateway "x"`, bad},
		{"route of no interface", with(func(c *api.NetworkConfig) { c.Routes = []*api.NetworkRoute{route("10.3.0.0/16", "eth7", "10.1.0.1")} }),
			`add route to 10.3.0.0/16 via 10.1.0.1 dev eth7: interface "eth7": not found`, errdefs.ErrNotFound},
		{"gateway out of reach", with(func(c *api.NetworkConfig) { c.Routes = []*api.NetworkRoute{route("10.3.0.0/16", "eth0", "10.7.0.1")} }),
			"add route to 10.3.0.0/16 via 10.7.0.1 dev eth0: network is unreachable", unix.ENETUNREACH},
		{"bad neighbour", with(func(c *api.NetworkConfig) {
			c.Neighbours = []*api.NetworkNeighbour{{Interface: "eth0", Address: "fe80::1%eth0", Mac: device(5)}}
		}), "neighbour", bad},
		{"neighbour of no interface", with(func(c *api.NetworkConfig) {
			c.Neighbours = []*api.NetworkNeighbour{{Interface: "eth9", Address: "10.1.0.1", Mac: device(5)}}
		}), "interface eth9: add neighbour 10.1.0.1", errdefs.ErrNotFound},
		{"rule without table", with(func(c *api.NetworkConfig) { c.Rules = []*api.NetworkRule{{Priority: 5}} }), "routing rule 5: no table", bad},
		{"too many routes", with(func(c *api.NetworkConfig) { c.Routes = make([]*api.NetworkRoute, api.MaxRoutes+1) }), "4097 routes: at most 4096", bad},
		{"too many interfaces", &api.NetworkConfig{Interfaces: make([]*api.NetworkInterface, api.MaxInterfaces+1)}, "65 interfaces", bad},
		{"too many addresses", one(edited(iface(1, "eth0"), func(i *api.NetworkInterface) { i.Addresses = make([]*api.NetworkAddress, api.MaxAddresses+1) })), "257 addresses", bad},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t, 2)
			err := m.configure(tt.cfg)
			if err == nil || !strings.Contains(err.Error(), tt.want) || !errors.Is(err, tt.kind) {
				t.Fatalf("Configure() = %v; want %q, %v", err, tt.want, tt.kind)
			}
			// An error stands in nobody's way.
			m.mustConfigure(one(iface(1, "eth0", "10.1.0.2/24")))
		})
	}
}
