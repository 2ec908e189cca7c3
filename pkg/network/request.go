//go:build linux

package network

import (
	"net"

	"github.com/vmrt/vmrt/api"
)

// request turns a configuration into the guest's words. devices has the
// hardware address of each interface's device by the interface's number. An
// interface without a device, and what refers to it, is left out.
func (c *Config) request(devices map[int]net.HardwareAddr) *api.NetworkConfig {
	r := &api.NetworkConfig{}
	known := map[string]bool{"lo": true}
	for _, i := range c.Interfaces {
		if mac, ok := devices[i.Index]; ok {
			known[i.Name] = true
			r.Interfaces = append(r.Interfaces, i.request(mac))
		}
	}
	for _, route := range c.Routes {
		if route.leadsTo(known) {
			r.Routes = append(r.Routes, route.request())
		}
	}
	for _, n := range c.Neighbours {
		if known[n.Interface] {
			r.Neighbours = append(r.Neighbours, &api.NetworkNeighbour{
				Interface: n.Interface, Address: n.Address.String(), Mac: n.MAC.String(),
			})
		}
	}
	for _, rule := range c.Rules {
		r.Rules = append(r.Rules, rule.request())
	}
	return r
}

func (i *Interface) request(device net.HardwareAddr) *api.NetworkInterface {
	r := &api.NetworkInterface{
		Device: device.String(), Name: i.Name, Mac: i.MAC.String(), Mtu: uint32(i.MTU), Down: !i.Up,
		AcceptRa: int32(i.AcceptRA), DisableIpv6: i.DisableIPv6,
	}
	for _, a := range i.Addresses {
		r.Addresses = append(r.Addresses, &api.NetworkAddress{
			Prefix: a.Prefix.String(), Peer: text(a.Peer), Broadcast: text(a.Broadcast),
			Scope: uint32(a.Scope), NoPrefixRoute: a.NoPrefixRoute,
		})
	}
	return r
}

func (r *Route) leadsTo(known map[string]bool) bool {
	for _, h := range r.Hops {
		if !known[h.Interface] {
			return false
		}
	}
	return true
}

func (r *Route) request() *api.NetworkRoute {
	n := &api.NetworkRoute{
		Destination: r.Destination.String(), Source: text(r.Source),
		Type: uint32(r.Type), Scope: uint32(r.Scope), Protocol: uint32(r.Protocol),
		Table: uint32(r.Table), Metric: uint32(r.Metric), Mtu: uint32(r.MTU), Advmss: uint32(r.AdvMSS),
	}
	for _, h := range r.Hops {
		n.Hops = append(n.Hops, &api.NetworkHop{
			Interface: h.Interface, Gateway: text(h.Gateway), Onlink: h.OnLink, Weight: uint32(h.Weight),
		})
	}
	return n
}

func (r *Rule) request() *api.NetworkRule {
	return &api.NetworkRule{
		Ipv6: r.IPv6, Priority: uint32(r.Priority), Source: text(r.Source), Destination: text(r.Destination),
		Input: r.Input, Output: r.Output, Mark: r.Mark, Mask: r.Mask, Invert: r.Invert,
		Table: uint32(r.Table), Suppress: uint32(r.Suppress),
	}
}

// text is empty for an address or a prefix that is not set.
func text(v interface {
	IsValid() bool
	String() string
}) string {
	if !v.IsValid() {
		return ""
	}
	return v.String()
}
