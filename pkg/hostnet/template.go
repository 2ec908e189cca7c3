//go:build linux

package hostnet

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
)

// Template is the host's network as a guest is to see it: one interface. It is
// plain data.
type Template struct {
	// Interface is the name of the host's interface, and the guest's. Empty:
	// the host has nothing but its loopback, and neither has the guest.
	Interface string
	// MAC is the guest's hardware address: the host's.
	MAC net.HardwareAddr
	MTU int
	// IPv4 and IPv6 are the host's addresses with the lengths of their
	// subnets; invalid for none.
	IPv4, IPv6 netip.Prefix
	// Gateway4 and Gateway6 are how the guest leaves its subnet: by the
	// host's gateway, or an address that stands for it.
	Gateway4, Gateway6 netip.Addr
}

// Stand-ins for a gateway where the host has none: passt answers for any.
var (
	noGateway4 = netip.MustParseAddr("169.254.2.1")
	noGateway6 = netip.MustParseAddr("fe80::1")
)

// netlinkTimeout bounds every answer of the kernel.
const netlinkTimeout = 10 * time.Second

// Find reads the network namespace of the calling thread. It takes the
// interface of the default route or, where there is none, the first one that
// is up and has an address.
func Find() (*Template, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("read the host's network: netlink socket: %w", err)
	}
	defer h.Close()
	if err := h.SetSocketTimeout(netlinkTimeout); err != nil {
		return nil, fmt.Errorf("read the host's network: netlink socket: %w", err)
	}
	t := &Template{}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		if err := t.add(h, family); err != nil {
			return nil, fmt.Errorf("read the host's network: %w", err)
		}
	}
	return t, nil
}

// add finds what the host has of a family.
func (t *Template) add(h *netlink.Handle, family int) error {
	links, err := dump(h.LinkList)
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return h.AddrList(nil, family) })
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	routes, err := dump(func() ([]netlink.Route, error) { return h.RouteList(nil, family) })
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	way := bestWay(family, links, addrs, routes)
	if way == nil {
		return nil
	}
	if t.Interface == "" {
		t.use(way.link.Attrs())
	}
	if family == netlink.FAMILY_V4 {
		t.IPv4, t.Gateway4 = way.address, orElse(way.gateway, noGateway4)
	} else {
		t.IPv6, t.Gateway6 = way.address, orElse(way.gateway, noGateway6)
	}
	return nil
}

// use takes over the interface's properties. Without a hardware address that a
// network card can have, it gets one of its own.
func (t *Template) use(a *netlink.LinkAttrs) {
	t.Interface, t.MAC, t.MTU = a.Name, a.HardwareAddr, min(a.MTU, maxMTU)
	if len(t.MAC) != 6 || t.MAC[0]&1 != 0 || bytes.Equal(t.MAC, make([]byte, 6)) {
		t.MAC = net.HardwareAddr{2, 0x76, 0x6d, 0, 0, 1}
	}
}

// maxMTU is the largest that passt takes: 65535 less a header of Ethernet,
// rounded down.
const maxMTU = 65520

func orElse(a, b netip.Addr) netip.Addr {
	if a.IsValid() {
		return a
	}
	return b
}

// way is how the host leaves itself.
type way struct {
	link    netlink.Link
	address netip.Prefix
	gateway netip.Addr // invalid for none
}

// bestWay returns the host's way out in a family; nil for none.
func bestWay(family int, links []netlink.Link, addrs []netlink.Addr, routes []netlink.Route) *way {
	slices.SortFunc(links, func(a, b netlink.Link) int { return cmp.Compare(a.Attrs().Index, b.Attrs().Index) })
	slices.SortStableFunc(routes, func(a, b netlink.Route) int { return cmp.Compare(a.Priority, b.Priority) })
	for _, r := range routes {
		if !isDefault(r) {
			continue
		}
		for _, hop := range hops(r) {
			if w := wayBy(links, addrs, hop.LinkIndex, r.Src); w != nil {
				w.gateway = gatewayOf(family, hop)
				return w
			}
		}
	}
	for _, l := range links {
		if w := wayBy(links, addrs, l.Attrs().Index, nil); w != nil {
			return w
		}
	}
	return nil
}

func isDefault(r netlink.Route) bool {
	if r.Type != unix.RTN_UNICAST || r.Table != unix.RT_TABLE_MAIN {
		return false
	}
	if r.Dst == nil {
		return true
	}
	ones, _ := r.Dst.Mask.Size()
	return ones == 0
}

func hops(r netlink.Route) []netlink.NexthopInfo {
	if len(r.MultiPath) == 0 {
		return []netlink.NexthopInfo{{LinkIndex: r.LinkIndex, Gw: r.Gw}}
	}
	var all []netlink.NexthopInfo
	for _, n := range r.MultiPath {
		all = append(all, *n)
	}
	return all
}

// gatewayOf returns the hop's gateway if that is of the route's family.
func gatewayOf(family int, hop netlink.NexthopInfo) netip.Addr {
	gw, _ := netip.AddrFromSlice(hop.Gw)
	gw = gw.Unmap()
	if gw.Is4() != (family == netlink.FAMILY_V4) {
		return netip.Addr{}
	}
	return gw
}

// wayBy returns the way by an interface that is up and has an address that
// others can know: the preferred one if it is there. Nil for none.
func wayBy(links []netlink.Link, addrs []netlink.Addr, index int, preferred net.IP) *way {
	i := slices.IndexFunc(links, func(l netlink.Link) bool { return l.Attrs().Index == index })
	if i < 0 || links[i].Attrs().Flags&net.FlagUp == 0 || links[i].Attrs().Flags&net.FlagLoopback != 0 {
		return nil
	}
	var found *way
	for _, a := range addrs {
		if a.LinkIndex != index || !lasting(a) {
			continue
		}
		ip, _ := netip.AddrFromSlice(a.IP)
		ones, _ := a.Mask.Size()
		w := &way{link: links[i], address: netip.PrefixFrom(ip.Unmap(), ones)}
		if preferred != nil && a.IP.Equal(preferred) {
			return w
		}
		if found == nil {
			found = w
		}
	}
	return found
}

// lasting reports whether an address is one to be known by.
func lasting(a netlink.Addr) bool {
	const passing = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED | unix.IFA_F_DEPRECATED | unix.IFA_F_TEMPORARY
	if a.IP.To4() != nil {
		return a.Scope != unix.RT_SCOPE_HOST
	}
	return a.Scope == unix.RT_SCOPE_UNIVERSE && a.Flags&passing == 0
}

// dumpAttempts is how often a list is asked for that changed while it was
// handed over.
const dumpAttempts = 8

// dump calls list until what it returns is of one moment.
func dump[T any](list func() ([]T, error)) ([]T, error) {
	for attempt := 1; ; attempt++ {
		items, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) || attempt == dumpAttempts {
			return items, err
		}
	}
}

// Request is what the guest must be told (vmrt.agent.v1 ConfigureNetwork). It
// has a default route wherever it has an address: what the host reaches by
// whichever of its routes, the guest reaches by way of the host.
func (t *Template) Request() *api.NetworkConfig {
	r := &api.NetworkConfig{}
	if t.Interface == "" {
		return r
	}
	i := &api.NetworkInterface{
		Device: t.MAC.String(), Name: t.Interface, Mac: t.MAC.String(), Mtu: uint32(t.MTU), DisableIpv6: !t.IPv6.IsValid(),
	}
	r.Interfaces = append(r.Interfaces, i)
	for _, f := range []struct {
		address netip.Prefix
		gateway netip.Addr
		all     string
	}{{t.IPv4, t.Gateway4, "0.0.0.0/0"}, {t.IPv6, t.Gateway6, "::/0"}} {
		if !f.address.IsValid() {
			continue
		}
		i.Addresses = append(i.Addresses, &api.NetworkAddress{Prefix: f.address.String()})
		r.Routes = append(r.Routes, &api.NetworkRoute{
			Destination: f.all, Type: unix.RTN_UNICAST, Protocol: unix.RTPROT_STATIC, Table: unix.RT_TABLE_MAIN,
			Hops: []*api.NetworkHop{{Interface: t.Interface, Gateway: f.gateway.String(), Onlink: true, Weight: 1}},
		})
	}
	return r
}

// Has reports whether ip is one of the guest's own addresses, which are the
// host's as well.
func (t *Template) Has(ip netip.Addr) bool {
	return ip.IsLoopback() || t.IPv4.IsValid() && t.IPv4.Addr() == ip || t.IPv6.IsValid() && t.IPv6.Addr() == ip
}
