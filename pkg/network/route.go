//go:build linux

package network

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// readRoutes converts the routes that somebody has configured.
func (s *scanner) readRoutes() ([]Route, error) {
	var routes []Route
	for _, r := range s.routes {
		if !configured(r) {
			continue
		}
		hops, known := s.hops(r)
		if !known {
			continue // of an interface that nobody uses
		}
		c, err := convertRoute(r)
		if err != nil {
			return nil, err
		}
		c.Hops = hops
		routes = append(routes, c)
	}
	// Gateways are found through routes without one.
	slices.SortStableFunc(routes, func(a, b Route) int { return a.distance() - b.distance() })
	return routes, nil
}

// configured reports whether a route is neither one of the kernel's own nor
// one that the guest's kernel will learn as the host's has.
func configured(r netlink.Route) bool {
	switch int(r.Protocol) {
	case unix.RTPROT_KERNEL, unix.RTPROT_RA, unix.RTPROT_REDIRECT:
		return false
	}
	if r.Table == unix.RT_TABLE_LOCAL || r.Flags&unix.RTM_F_CLONED != 0 {
		return false
	}
	switch r.Type {
	case unix.RTN_UNICAST, unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT, unix.RTN_THROW, unix.RTN_LOCAL:
		return true
	}
	return false
}

// leadsNowhere reports whether routes of a type have no hops.
func leadsNowhere(kind int) bool {
	return kind != unix.RTN_UNICAST && kind != unix.RTN_LOCAL
}

// distance is 0 for a route that needs no other to be added.
func (r *Route) distance() int {
	for _, h := range r.Hops {
		if h.Gateway.IsValid() && !h.OnLink {
			return 1
		}
	}
	return 0
}

// hops returns where a route leads, and whether it is all interfaces that the
// guest has.
func (s *scanner) hops(r netlink.Route) ([]Hop, bool) {
	if leadsNowhere(r.Type) {
		return nil, true
	}
	infos := r.MultiPath
	if len(infos) == 0 {
		infos = []*netlink.NexthopInfo{{LinkIndex: r.LinkIndex, Gw: r.Gw, Via: r.Via, Flags: r.Flags}}
	}
	var hops []Hop
	for _, n := range infos {
		name, known := s.names[n.LinkIndex]
		if !known {
			return nil, false
		}
		hops = append(hops, Hop{
			Interface: name, Gateway: gateway(n), Weight: n.Hops + 1,
			OnLink: n.Flags&unix.RTNH_F_ONLINK != 0,
		})
	}
	return hops, true
}

func gateway(n *netlink.NexthopInfo) netip.Addr {
	ip := n.Gw
	if via, ok := n.Via.(*netlink.Via); ok && via != nil {
		ip = via.Addr
	}
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

func convertRoute(r netlink.Route) (Route, error) {
	dst, err := destinationOf(r)
	if err != nil {
		return Route{}, err
	}
	if r.Encap != nil || r.NewDst != nil || r.MPLSDst != nil {
		return Route{}, &UnsupportedError{Object: "route to " + dst.String(), Reason: "it encapsulates packets"}
	}
	src, _ := netip.AddrFromSlice(r.Src)
	return Route{
		Destination: dst, Source: src.Unmap(),
		Type: r.Type, Scope: int(r.Scope), Protocol: int(r.Protocol),
		Table: r.Table, Metric: r.Priority, MTU: r.MTU, AdvMSS: r.AdvMSS,
	}, nil
}

func destinationOf(r netlink.Route) (netip.Prefix, error) {
	if r.Dst == nil || r.Dst.IP == nil {
		if r.Family == netlink.FAMILY_V6 {
			return netip.PrefixFrom(netip.IPv6Unspecified(), 0), nil
		}
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0), nil
	}
	p, err := prefixOf(r.Dst)
	if err != nil {
		return p, fmt.Errorf("route: %w", err)
	}
	return p.Masked(), nil
}

func (s *scanner) readNeighbours() ([]Neighbour, error) {
	list, err := dump(func() ([]netlink.Neigh, error) { return s.handle.NeighList(0, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list neighbours: %w", err)
	}
	var neighbours []Neighbour
	for _, n := range list {
		ip, ok := netip.AddrFromSlice(n.IP)
		name := s.names[n.LinkIndex]
		if !ok || n.State&netlink.NUD_PERMANENT == 0 || n.Flags&netlink.NTF_PROXY != 0 || name == "" || name == "lo" || len(n.HardwareAddr) != 6 {
			continue
		}
		neighbours = append(neighbours, Neighbour{Interface: name, Address: ip.Unmap(), MAC: n.HardwareAddr})
	}
	return neighbours, nil
}

// The priorities of the rules that every namespace has
// (net/ipv4/fib_rules.c, net/ipv6/fib6_rules.c).
var kernelRules = map[int]int{0: unix.RT_TABLE_LOCAL, 32766: unix.RT_TABLE_MAIN, 32767: unix.RT_TABLE_DEFAULT}

func (s *scanner) readRules() ([]Rule, error) {
	var rules []Rule
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := dump(func() ([]netlink.Rule, error) { return s.handle.RuleList(family) })
		if err != nil {
			return nil, fmt.Errorf("list routing rules: %w", err)
		}
		for _, r := range list {
			if table, ok := kernelRules[r.Priority]; ok && table == r.Table && r.Src == nil && r.Dst == nil && r.Mark == 0 {
				continue
			}
			c, err := convertRule(r)
			if err != nil {
				return nil, err
			}
			rules = append(rules, c)
		}
	}
	return rules, nil
}

func convertRule(r netlink.Rule) (Rule, error) {
	object := fmt.Sprintf("routing rule %d", r.Priority)
	switch {
	case r.Table == 0:
		return Rule{}, &UnsupportedError{Object: object, Reason: "it chooses no table"}
	case r.TunID != 0, r.Goto >= 0, r.Flow >= 0, r.Tos != 0, r.SuppressIfgroup >= 0,
		r.Dport != nil, r.Sport != nil, r.IPProto != 0, r.UIDRange != nil:
		return Rule{}, &UnsupportedError{Object: object, Reason: "it looks at more than addresses, interfaces and marks"}
	}
	c := Rule{
		IPv6: r.Family == netlink.FAMILY_V6, Priority: r.Priority, Table: r.Table,
		Input: r.IifName, Output: r.OifName, Mark: r.Mark, Invert: r.Invert, Suppress: r.SuppressPrefixlen + 1,
	}
	if r.Mask != nil {
		c.Mask = *r.Mask
	}
	for _, p := range []struct {
		from *net.IPNet
		to   *netip.Prefix
	}{{r.Src, &c.Source}, {r.Dst, &c.Destination}} {
		if p.from == nil {
			continue
		}
		prefix, err := prefixOf(p.from)
		if err != nil {
			return Rule{}, fmt.Errorf("%s: %w", object, err)
		}
		*p.to = prefix
	}
	return c, nil
}
