package network

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
)

// config is an api.NetworkConfig that was checked.
type config struct {
	interfaces []iface
	routes     []route
	neighbours []neighbour
	rules      []*netlink.Rule
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

func parse(c *api.NetworkConfig) (*config, error) {
	for _, n := range []struct {
		what      string
		have, max int
	}{
		{"interfaces", len(c.Interfaces), api.MaxInterfaces},
		{"routes", len(c.Routes), api.MaxRoutes},
		{"neighbours", len(c.Neighbours), api.MaxNeighbours},
		{"rules", len(c.Rules), api.MaxRules},
	} {
		if n.have > n.max {
			return nil, invalid("%d %s: at most %d", n.have, n.what, n.max)
		}
	}
	p := &config{}
	if err := p.parseInterfaces(c.Interfaces); err != nil {
		return nil, err
	}
	for _, m := range c.Routes {
		r, err := parseRoute(m)
		if err != nil {
			return nil, fmt.Errorf("route to %q: %w", m.Destination, err)
		}
		p.routes = append(p.routes, r)
	}
	for _, m := range c.Neighbours {
		n, err := parseNeighbour(m)
		if err != nil {
			return nil, fmt.Errorf("neighbour %q of interface %q: %w", m.Address, m.Interface, err)
		}
		p.neighbours = append(p.neighbours, n)
	}
	for _, m := range c.Rules {
		r, err := parseRule(m)
		if err != nil {
			return nil, fmt.Errorf("routing rule %d: %w", m.Priority, err)
		}
		p.rules = append(p.rules, r)
	}
	return p, nil
}

func (p *config) parseInterfaces(list []*api.NetworkInterface) error {
	names, devices := make(map[string]bool), make(map[string]bool)
	for _, m := range list {
		i, err := parseInterface(m)
		if err != nil {
			return fmt.Errorf("interface %q: %w", m.Name, err)
		}
		if names[i.name] || devices[i.device] {
			return invalid("interface %q, device %s: named twice", i.name, i.device)
		}
		names[i.name], devices[i.device] = true, true
		p.interfaces = append(p.interfaces, i)
	}
	return nil
}

func parseInterface(m *api.NetworkInterface) (iface, error) {
	i := iface{
		name: m.Name, mtu: int(m.Mtu), down: m.Down,
		acceptRA: m.AcceptRa, disableIPv6: m.DisableIpv6,
	}
	if err := checkName(m.Name); err != nil || m.Name == "lo" {
		return i, invalid("want 1 to %d printable characters but '/' and ':'", unix.IFNAMSIZ-1)
	}
	device, err := parseMAC(m.Device)
	if err != nil {
		return i, fmt.Errorf("device: %w", err)
	}
	i.device = device.String()
	if i.mac, err = parseMAC(m.Mac); err != nil {
		return i, err
	}
	if i.mtu < 68 || i.mtu > 65535 { // ETH_MIN_MTU, ETH_MAX_MTU
		return i, invalid("MTU %d: want 68 to 65535", m.Mtu)
	}
	if len(m.Addresses) > api.MaxAddresses {
		return i, invalid("%d addresses: at most %d", len(m.Addresses), api.MaxAddresses)
	}
	for _, a := range m.Addresses {
		addr, err := parseAddress(a)
		if err != nil {
			return i, fmt.Errorf("address %q: %w", a.Prefix, err)
		}
		i.addresses = append(i.addresses, addr)
	}
	return i, nil
}

// checkName follows dev_valid_name of net/core/dev.c.
func checkName(name string) error {
	bad := func(r rune) bool { return r == '/' || r == ':' || unicode.IsSpace(r) || unicode.IsControl(r) }
	if name == "" || len(name) >= unix.IFNAMSIZ || name == "." || name == ".." || strings.ContainsFunc(name, bad) {
		return invalid("interface name %q", name)
	}
	return nil
}

func parseMAC(s string) (net.HardwareAddr, error) {
	mac, err := net.ParseMAC(s)
	if err != nil || len(mac) != 6 {
		return nil, invalid("hardware address %q", s)
	}
	return mac, nil
}

func parseAddress(m *api.NetworkAddress) (*netlink.Addr, error) {
	prefix, err := netip.ParsePrefix(m.Prefix)
	if err != nil {
		return nil, invalid("want an address with a prefix length")
	}
	a := &netlink.Addr{IPNet: ipNet(prefix), Scope: int(m.Scope & 0xff)}
	if m.NoPrefixRoute {
		a.Flags |= unix.IFA_F_NOPREFIXROUTE
	}
	if m.Peer != "" {
		peer, err := netip.ParsePrefix(m.Peer)
		if err != nil || peer.Addr().Is4() != prefix.Addr().Is4() {
			return nil, invalid("peer %q", m.Peer)
		}
		a.Peer = ipNet(peer)
	}
	if prefix.Addr().Is6() {
		// Nobody else has it: usable without a wait.
		a.Flags |= unix.IFA_F_NODAD
		return a, nil
	}
	// netlink takes none for a wish to have it computed, 0.0.0.0 for none.
	a.Broadcast = net.IPv4zero
	if m.Broadcast != "" {
		broadcast, err := netip.ParseAddr(m.Broadcast)
		if err != nil || !broadcast.Is4() {
			return nil, invalid("broadcast address %q", m.Broadcast)
		}
		a.Broadcast = broadcast.AsSlice()
	}
	return a, nil
}

func parseNeighbour(m *api.NetworkNeighbour) (neighbour, error) {
	n := neighbour{iface: m.Interface}
	ip, err := netip.ParseAddr(m.Address)
	if err != nil || ip.Zone() != "" {
		return n, invalid("want an address")
	}
	n.ip = ip.AsSlice()
	n.mac, err = parseMAC(m.Mac)
	return n, err
}

func parseRule(m *api.NetworkRule) (*netlink.Rule, error) {
	r := netlink.NewRule()
	r.Family = netlink.FAMILY_V4
	if m.Ipv6 {
		r.Family = netlink.FAMILY_V6
	}
	r.Priority, r.Table, r.Mark, r.Invert = int(m.Priority), int(m.Table), m.Mark, m.Invert
	r.IifName, r.OifName = m.Input, m.Output
	r.SuppressPrefixlen = int(m.Suppress) - 1
	if m.Mask != 0 {
		r.Mask = &m.Mask
	}
	for _, name := range []string{m.Input, m.Output} {
		if err := checkName(name); name != "" && err != nil {
			return nil, err
		}
	}
	if m.Table == 0 {
		return nil, invalid("no table")
	}
	for _, p := range []struct {
		text string
		to   **net.IPNet
	}{{m.Source, &r.Src}, {m.Destination, &r.Dst}} {
		if p.text == "" {
			continue
		}
		prefix, err := netip.ParsePrefix(p.text)
		if err != nil || prefix.Addr().Is6() != m.Ipv6 {
			return nil, invalid("prefix %q", p.text)
		}
		*p.to = ipNet(prefix)
	}
	return r, nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
