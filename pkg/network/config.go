//go:build linux

package network

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/containerd/errdefs"
)

// Config is the configuration of a network namespace, as far as a pod sees it.
// It is plain data: copied, never changed once Scan has returned it.
type Config struct {
	// Interfaces are in the order of their numbers, which is the order in
	// which they were made. The loopback interface is not among them.
	Interfaces []Interface
	// Routes are those of every table, without those that the kernel makes
	// by itself from addresses or from what routers announce, ordered so that
	// a gateway can be reached when a route through it is added.
	Routes []Route
	// Neighbours are the permanent ones.
	Neighbours []Neighbour
	// Rules are those beyond the kernel's own three.
	Rules []Rule
}

// Interface is a network interface that can be joined to a tap. One without
// addresses is as good as any: it appears in the guest without addresses.
type Interface struct {
	Name string
	// Index is its number in the namespace.
	Index int
	// Kind is what ip(8) calls its type: "veth". "device" is hardware.
	Kind string
	MAC  net.HardwareAddr
	MTU  int
	Up   bool
	// AllMulticast: it takes the frames of every multicast group.
	AllMulticast bool
	Addresses    []Address
	// AcceptRA and DisableIPv6 are the sysctls of these names
	// (Documentation/networking/ip-sysctl). Where the host's kernel has no
	// IPv6, it is disabled.
	AcceptRA    int
	DisableIPv6 bool
}

// Address is an interface's own address with the length of its subnet.
type Address struct {
	Prefix netip.Prefix
	// Peer is the other end of a point-to-point address, or invalid.
	Peer netip.Prefix
	// Broadcast is invalid for none.
	Broadcast netip.Addr
	// Scope is one of unix.RT_SCOPE_*.
	Scope int
	// NoPrefixRoute: the namespace has no route to the subnet that the kernel
	// had made from the address, because it was told not to or because
	// somebody deleted it, as the CNI's ptp plugin does.
	NoPrefixRoute bool
}

// Route is one entry of a routing table.
type Route struct {
	// Destination is masked. A default route's has length 0.
	Destination netip.Prefix
	// Hops is empty for a route that leads nowhere, such as a blackhole.
	Hops []Hop
	// Source is the preferred source address, or invalid.
	Source netip.Addr
	// Type, Scope and Protocol are unix.RTN_*, RT_SCOPE_* and RTPROT_*.
	Type, Scope, Protocol int
	Table, Metric         int
	MTU, AdvMSS           int // 0: the kernel's own
}

// Hop is where a route leads.
type Hop struct {
	// Interface is a name of one of Config.Interfaces or "lo".
	Interface string
	// Gateway may be of another family than the destination. Invalid: none.
	Gateway netip.Addr
	OnLink  bool
	// Weight is the hop's share, at least 1.
	Weight int
}

// Neighbour is a permanent entry of an interface's neighbour table.
type Neighbour struct {
	Interface string
	Address   netip.Addr
	MAC       net.HardwareAddr
}

// Rule chooses a routing table for what it matches.
type Rule struct {
	IPv6                bool
	Priority            int
	Source, Destination netip.Prefix // invalid: any
	Input, Output       string       // interfaces; empty: any
	Mark, Mask          uint32
	Invert              bool
	Table               int
	// Suppress is one more than the length of the longest prefix whose routes
	// the rule passes over; 0 for none.
	Suppress int
}

// UnsupportedError is about something in the network namespace that cannot be
// given to a virtual machine. It is an errdefs.ErrFailedPrecondition; not an
// ErrNotImplemented, which containerd would take for a shim of another version.
type UnsupportedError struct {
	// Object is what: "interface tun0", "rule 100".
	Object string
	// Reason says why, and what to do where that is known.
	Reason string
}

func (e *UnsupportedError) Error() string {
	return fmt.Sprintf("%s cannot be given to a virtual machine: %s", e.Object, e.Reason)
}

func (e *UnsupportedError) Unwrap() error { return errdefs.ErrFailedPrecondition }

// LateInterfaceError is about an interface that has arrived after the virtual
// machine started, which has no spare device left for it. It is an
// errdefs.ErrResourceExhausted.
type LateInterfaceError struct {
	Interface string
	// Spares is how many devices the virtual machine had for that.
	Spares int
}

func (e *LateInterfaceError) Error() string {
	return fmt.Sprintf("interface %s has arrived after the virtual machine was started with %d spare network devices, and none is left: raise late_interfaces in the configuration",
		e.Interface, e.Spares)
}

func (e *LateInterfaceError) Unwrap() error { return errdefs.ErrResourceExhausted }
