//go:build linux

package network

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// joinable are the kinds of interfaces whose frames pass the ingress hook of
// traffic control and are nobody else's. netlink's name for hardware is
// "device".
var joinable = []string{
	"device", "veth", "macvlan", "ipvlan", "vlan", "bridge", "bond", "team", "dummy", "vxlan", "geneve", "netkit",
}

// stacked are the kinds that take frames from another interface, whose ingress
// hook would take them first.
var stacked = []string{"vlan", "macvlan", "macvtap", "ipvlan", "ipvtap"}

// classify says whether an interface is for the guest. Not for the guest are
// loopback, our own taps, the ports of a bridge or bond that is for the guest,
// and those that nobody uses: kernel modules put one into every namespace.
func (s *scanner) classify(l netlink.Link) (bool, error) {
	a := l.Attrs()
	if a.Flags&net.FlagLoopback != 0 || isOurTap(l) {
		return false, nil
	}
	if a.MasterIndex != 0 && slices.ContainsFunc(s.links, func(m netlink.Link) bool { return m.Attrs().Index == a.MasterIndex }) {
		return false, nil
	}
	reason := s.obstacle(l)
	if reason == "" {
		return true, nil
	}
	if a.Flags&net.FlagUp == 0 && len(s.addrs[a.Index]) == 0 {
		return false, nil
	}
	return false, &UnsupportedError{Object: fmt.Sprintf("interface %s (%s)", a.Name, l.Type()), Reason: reason}
}

// obstacle says why an interface cannot be joined to a tap; empty if it can.
func (s *scanner) obstacle(l netlink.Link) string {
	a := l.Attrs()
	if l.Type() == "tuntap" {
		return "its frames belong to the program that has made it"
	}
	if a.EncapType != "ether" {
		return "it carries no Ethernet frames"
	}
	if !slices.Contains(joinable, l.Type()) {
		return "traffic control cannot redirect this type; use veth, macvlan or a physical interface"
	}
	if a.RawFlags&unix.IFF_NOARP != 0 && l.Type() != "dummy" {
		return "it works without hardware addresses (layer 3); use its layer 2 mode"
	}
	if v, ok := l.(*netlink.IPVlan); ok && v.Mode != netlink.IPVLAN_MODE_L2 {
		return "it works without hardware addresses (layer 3); use its layer 2 mode"
	}
	for _, other := range s.links {
		// An index of another namespace means another interface.
		o := other.Attrs()
		if o.ParentIndex == a.Index && o.NetNsID < 0 && slices.Contains(stacked, other.Type()) {
			return fmt.Sprintf("interface %s is on top of it", o.Name)
		}
	}
	return ""
}

func (s *scanner) readInterface(l netlink.Link) (Interface, error) {
	a := l.Attrs()
	i := Interface{
		Name: a.Name, Index: a.Index, Kind: l.Type(), MAC: a.HardwareAddr, MTU: a.MTU,
		Up:           a.Flags&net.FlagUp != 0,
		AllMulticast: a.RawFlags&unix.IFF_ALLMULTI != 0,
		DisableIPv6:  true,
	}
	if len(i.MAC) != 6 {
		return i, &UnsupportedError{Object: "interface " + i.Name, Reason: fmt.Sprintf("its hardware address is %q", i.MAC)}
	}
	disabled, err := readSysctl(i.Name, "disable_ipv6")
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return i, err
	default:
		i.DisableIPv6 = disabled != 0
		if i.AcceptRA, err = readSysctl(i.Name, "accept_ra"); err != nil {
			return i, err
		}
	}
	for _, addr := range s.addrs[i.Index] {
		if i.makesItself(addr) {
			continue
		}
		converted, err := s.convertAddress(addr, i.Up)
		if err != nil {
			return i, fmt.Errorf("interface %s: address %s: %w", i.Name, addr.IPNet, err)
		}
		i.Addresses = append(i.Addresses, converted)
	}
	return i, nil
}

// ifaStablePrivacy is IFA_F_STABLE_PRIVACY of linux/if_addr.h.
const ifaStablePrivacy = 0x800

// makesItself reports whether the guest's kernel will come to the address by
// itself: a link-local one, made from the hardware address, or one from a
// router's announcement, which reaches the guest as well.
func (i *Interface) makesItself(a netlink.Addr) bool {
	ip, ok := netip.AddrFromSlice(a.IP)
	if !ok || ip.Unmap().Is4() {
		return false
	}
	if ip.IsLinkLocalUnicast() {
		return a.Flags&ifaStablePrivacy != 0 || bytes.Equal(a.IP[8:], eui64(i.MAC))
	}
	return a.Flags&unix.IFA_F_PERMANENT == 0 && i.AcceptRA > 0
}

// eui64 returns the interface identifier that RFC 4291, appendix A, makes from
// a hardware address of six octets.
func eui64(mac net.HardwareAddr) []byte {
	return []byte{mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]}
}

func (s *scanner) convertAddress(a netlink.Addr, up bool) (Address, error) {
	prefix, err := prefixOf(a.IPNet)
	if err != nil {
		return Address{}, err
	}
	c := Address{Prefix: prefix, Scope: a.Scope, NoPrefixRoute: a.Flags&unix.IFA_F_NOPREFIXROUTE != 0}
	subnet := prefix
	if a.Peer != nil {
		if c.Peer, err = prefixOf(a.Peer); err != nil {
			return Address{}, err
		}
		subnet = c.Peer
	}
	if len(a.Broadcast) != 0 {
		c.Broadcast, _ = netip.AddrFromSlice(a.Broadcast)
		c.Broadcast = c.Broadcast.Unmap()
	}
	// The kernel makes these routes when the interface comes up.
	if up && !subnet.IsSingleIP() && !s.hasPrefixRoute(a.LinkIndex, subnet.Masked()) {
		c.NoPrefixRoute = true
	}
	return c, nil
}

func (s *scanner) hasPrefixRoute(link int, subnet netip.Prefix) bool {
	return slices.ContainsFunc(s.routes, func(r netlink.Route) bool {
		if r.LinkIndex != link || r.Protocol != unix.RTPROT_KERNEL || r.Table == unix.RT_TABLE_LOCAL {
			return false
		}
		dst, err := destinationOf(r)
		return err == nil && dst == subnet
	})
}

// prefixOf keeps the bits of the host: "10.0.0.1/24".
func prefixOf(n *net.IPNet) (netip.Prefix, error) {
	ip, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if !ok || bits == 0 {
		return netip.Prefix{}, fmt.Errorf("malformed address %v", n)
	}
	// A 4-byte mask on a 16-byte form of an IPv4 address, and the like.
	if ip.Is4In6() && bits == 32 {
		ip = ip.Unmap()
	}
	return netip.PrefixFrom(ip, ones), nil
}

// sysctlPath returns the file of an IPv6 setting of an interface. The files
// below /proc/sys/net are those of the reading thread's network namespace.
func sysctlPath(iface, name string) string {
	return "/proc/sys/net/ipv6/conf/" + iface + "/" + name
}

func readSysctl(iface, name string) (int, error) {
	b, err := os.ReadFile(sysctlPath(iface, name))
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0, fmt.Errorf("sysctl net.ipv6.conf.%s.%s: %w", iface, name, err)
	}
	return n, nil
}
