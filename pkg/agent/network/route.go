package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
)

// route is a route whose interfaces are still names.
type route struct {
	netlink.Route
	hops []hop
}

type hop struct {
	iface   string
	gateway netip.Addr
	onlink  bool
	weight  int
}

func parseRoute(m *api.NetworkRoute) (route, error) {
	dst, err := netip.ParsePrefix(m.Destination)
	if err != nil {
		return route{}, invalid("want a prefix")
	}
	dst = dst.Masked()
	r := route{Route: netlink.Route{
		Dst: ipNet(dst), Type: int(m.Type), Scope: netlink.Scope(m.Scope), Protocol: netlink.RouteProtocol(m.Protocol),
		Table: int(m.Table), Priority: int(m.Metric), MTU: int(m.Mtu), AdvMSS: int(m.Advmss),
		Family: netlink.FAMILY_V4,
	}}
	if dst.Addr().Is6() {
		r.Family = netlink.FAMILY_V6
	}
	if m.Type > 0xff || m.Scope > 0xff || m.Protocol > 0xff {
		return r, invalid("type %d, scope %d, protocol %d: at most 255 each", m.Type, m.Scope, m.Protocol)
	}
	if m.Source != "" {
		src, err := netip.ParseAddr(m.Source)
		if err != nil || src.Is4() != dst.Addr().Is4() {
			return r, invalid("source %q", m.Source)
		}
		r.Src = src.AsSlice()
	}
	if len(m.Hops) > api.MaxHops {
		return r, invalid("%d hops: at most %d", len(m.Hops), api.MaxHops)
	}
	for _, h := range m.Hops {
		parsed := hop{iface: h.Interface, onlink: h.Onlink, weight: int(max(1, min(h.Weight, 256)))}
		if h.Gateway != "" {
			if parsed.gateway, err = netip.ParseAddr(h.Gateway); err != nil || parsed.gateway.Zone() != "" {
				return r, invalid("gateway %q", h.Gateway)
			}
		}
		r.hops = append(r.hops, parsed)
	}
	return r, nil
}

// String is for errors: "route to 10.0.0.0/24 via 10.0.0.1 dev eth0".
func (r *route) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "route to %s", r.Dst)
	for _, h := range r.hops {
		if h.gateway.IsValid() {
			fmt.Fprintf(&b, " via %s", h.gateway)
		}
		fmt.Fprintf(&b, " dev %s", h.iface)
	}
	if r.Table != unix.RT_TABLE_MAIN {
		fmt.Fprintf(&b, " table %d", r.Table)
	}
	return b.String()
}

// add adds the route behind others to the same destination, if there are any.
// It is no error that the route is there.
func (r *route) add(h *netlink.Handle, index map[string]int) error {
	n := r.Route
	var hops []*netlink.NexthopInfo
	for _, hop := range r.hops {
		i, ok := index[hop.iface]
		if !ok {
			return fmt.Errorf("interface %q: %w", hop.iface, errdefs.ErrNotFound)
		}
		info := &netlink.NexthopInfo{LinkIndex: i, Hops: hop.weight - 1}
		if hop.onlink {
			info.Flags = int(netlink.FLAG_ONLINK)
		}
		hop.through(info, n.Family)
		hops = append(hops, info)
	}
	if len(hops) == 1 {
		n.LinkIndex, n.Gw, n.Via, n.Flags = hops[0].LinkIndex, hops[0].Gw, hops[0].Via, hops[0].Flags
	} else {
		n.MultiPath = hops
	}
	if err := h.RouteAppend(&n); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// through sets the gateway, which may be of another family than the route.
func (h *hop) through(info *netlink.NexthopInfo, family int) {
	if !h.gateway.IsValid() {
		return
	}
	ip := net.IP(h.gateway.AsSlice())
	of := netlink.FAMILY_V4
	if h.gateway.Is6() {
		of = netlink.FAMILY_V6
	}
	if of == family {
		info.Gw = ip
	} else {
		info.Via = &netlink.Via{AddrFamily: of, Addr: ip}
	}
}

// neighbour is a permanent entry of an interface's neighbour table.
type neighbour struct {
	iface string
	ip    net.IP
	mac   net.HardwareAddr
}

func (n *neighbour) add(h *netlink.Handle, index map[string]int) error {
	i, ok := index[n.iface]
	if !ok {
		return errdefs.ErrNotFound
	}
	return h.NeighSet(&netlink.Neigh{LinkIndex: i, State: netlink.NUD_PERMANENT, IP: n.ip, HardwareAddr: n.mac})
}

// addRule adds a rule. It is no error that it is there.
func addRule(h *netlink.Handle, r *netlink.Rule) error {
	if err := h.RuleAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}
