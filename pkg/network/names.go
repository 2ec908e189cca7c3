//go:build linux

package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
)

// A name server that listens in the pod's network namespace on the host, such
// as Docker's at 127.0.0.11, asks others from there: its questions leave through
// the pod's interface, and their answers would go to the guest. So the answers
// are let through to the host's stack. They are told by where they come from,
// port 53, and where they go to, a port of a range that the namespace is given
// for its own and that the guest's kernel does not choose from. The stack must
// also hear who has the gateway's address, which the guest needs as well.

// The ports of what the namespace's own processes send, the last 1024: a guest
// uses 32768 to 60999 (Documentation/networking/ip-sysctl, ip_local_port_range).
const (
	hostPorts    = "64512 65535"
	hostPortMask = 0xfc00
)

const portRangeFile = "/proc/sys/net/ipv4/ip_local_port_range"

// arpIgnoreAll is the value of arp_ignore with which a host answers no ARP
// request (Documentation/networking/ip-sysctl): the guest does.
const arpIgnoreAll = "8"

// PassNames lets the answers of name servers, by IPv4, pass to processes of the
// host in the pod's network namespace, from every interface that is joined or
// will be. Close undoes it. Idempotent.
func (n *Network) PassNames(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return errClosed
	}
	if n.portRange != nil {
		return nil
	}
	err := inside(ctx, n.ns, func(h *netlink.Handle) (err error) {
		before, err := replace(portRangeFile, hostPorts)
		if err != nil {
			return err
		}
		n.portRange = &before
		for _, d := range n.devices {
			d.passNames = true
			if d.joined.Index == 0 {
				continue
			}
			if err := d.pass(h); err != nil {
				return fmt.Errorf("interface %s: %w", d.joined.Name, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("let name servers of the pod's network answer: %w", err)
	}
	return nil
}

// pass adds what lets answers through to the interface that is joined.
func (d *device) pass(h *netlink.Handle) (err error) {
	if d.arpIgnore, err = replace(arpIgnoreFile(d.joined.Name), arpIgnoreAll); err != nil {
		return err
	}
	for _, f := range passFilters(d.joined.Index, d.tap.index) {
		if err := h.FilterAdd(f); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("let answers of name servers through: %w", err)
		}
	}
	return nil
}

// stopPassing undoes what pass has set. The filters are removed with the rest.
func (d *device) stopPassing() error {
	if d.arpIgnore == "" {
		return nil
	}
	_, err := replace(arpIgnoreFile(d.joined.Name), d.arpIgnore)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	d.arpIgnore = ""
	return err
}

// restorePorts undoes what PassNames has set for the namespace.
func (n *Network) restorePorts() error {
	if n.portRange == nil {
		return nil
	}
	_, err := replace(portRangeFile, *n.portRange)
	if err == nil {
		n.portRange = nil
	}
	return err
}

func arpIgnoreFile(iface string) string { return "/proc/sys/net/ipv4/conf/" + iface + "/arp_ignore" }

// replace writes a setting of the calling thread's network namespace and
// returns what it was.
func replace(file, value string) (before string, err error) {
	b, err := os.ReadFile(file)
	if err == nil {
		err = os.WriteFile(file, []byte(value), 0)
	}
	return strings.TrimSpace(string(b)), err
}

// Filters of a lower number come first.
const (
	passARPPriority   = filterPriority - 2
	passNamesPriority = filterPriority - 1
)

// passFilters are those that come before the redirect from interface from to
// tap: ARP for both, answers of name servers for the host's stack.
func passFilters(from, tap int) []*netlink.U32 {
	attrs := func(priority uint16, protocol uint16) netlink.FilterAttrs {
		return netlink.FilterAttrs{LinkIndex: from, Parent: netlink.HANDLE_MIN_INGRESS, Priority: priority, Protocol: protocol}
	}
	mirror := netlink.NewMirredAction(tap)
	mirror.MirredAction = netlink.TCA_EGRESS_MIRROR
	mirror.Action = netlink.TC_ACT_OK
	return []*netlink.U32{
		{FilterAttrs: attrs(passARPPriority, unix.ETH_P_ARP), Actions: []netlink.Action{mirror}},
		{
			FilterAttrs: attrs(passNamesPriority, unix.ETH_P_IP),
			// What matches and has no action is accepted.
			Sel: &nl.TcU32Sel{Flags: nl.TC_U32_TERMINAL, Keys: []nl.TcU32Key{
				{Off: 0, Mask: 0x0f000000, Val: 0x05000000},                                       // a header of 20 bytes
				{Off: 4, Mask: 0x00001fff, Val: 0},                                                // not a later fragment
				{Off: 20, Mask: 0xffff0000 | hostPortMask, Val: api.PortNames<<16 | hostPortMask}, // from port 53 to the namespace's
			}},
		},
	}
}
