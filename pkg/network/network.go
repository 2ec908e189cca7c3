//go:build linux

// Package network joins what the CNI has put into a pod's network namespace to
// the pod's virtual machine.
//
// Contract. Scan reads a namespace into plain data. Open gives every interface
// in it a tap and joins the two with traffic control: each frame that arrives
// on one leaves through the other. The interface keeps its addresses, so that
// the CNI's own checks and its deletion work as ever, but the host's stack does
// not see a frame any more: what answers to ARP, neighbour discovery, ICMP and
// TCP is the guest alone, under the interface's hardware address. Request is
// what the guest must be told (vmrt.agent.v1 ConfigureNetwork) to have the same
// names, addresses, routes, neighbours, rules and sizes.
//
// The machine type cannot add network devices later, so Options.Spares devices
// more may be made at boot, with taps that are joined to nothing. Update looks
// for interfaces that have arrived since and joins each to one of them.
//
// Concurrency: every method may be called from any goroutine.
//
// PassNames is for name servers that run in the namespace: it lets the answers
// to them through to the host's stack.
//
// Not guaranteed: what the host's own processes send from inside the namespace
// still leaves through the interface, but other answers go to the guest. Settings
// below /proc/sys/net are not copied but for accept_ra and disable_ipv6.
// Interfaces that leave the namespace, and what leaves an interface, stay in
// the guest. Multicast groups are joined by the guest alone, so the interface
// takes the frames of all (IFF_ALLMULTI).
package network

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/hypervisor"
)

// NetNS runs functions on a thread that is in a network namespace.
// *podns.Namespaces is one.
type NetNS interface {
	Do(ctx context.Context, f func() error) error
}

// Options says how Open makes devices.
type Options struct {
	// Queues is how many pairs of queues each device has: the virtual
	// machine's CPUs. More than maxQueues are not made. 0 is 1.
	Queues int
	// Spares is how many devices are made for interfaces that are not there
	// yet.
	Spares int
}

// maxQueues bounds what a device costs: descriptors, and memory in the guest.
const maxQueues = 8

// device is one network device of the virtual machine.
type device struct {
	tap *tap
	// mac is what the device is made with, and known by to the guest.
	mac net.HardwareAddr
	// joined is the interface, with Index 0 for a spare.
	joined Interface
	// multicast: Close must take IFF_ALLMULTI back.
	multicast bool
	// passNames: what is joined lets answers of name servers through, and
	// arpIgnore is the setting that it had, "" if none was changed.
	passNames bool
	arpIgnore string
}

// Network is a pod's network, joined to the devices of a virtual machine.
type Network struct {
	ns     NetNS
	spares int

	mu      sync.Mutex // held during every change of the namespace
	closed  bool       // guarded by mu
	config  *Config    // guarded by mu; replaced, never changed
	devices []*device  // guarded by mu
	// portRange is the setting that PassNames has changed, nil for none.
	portRange *string // guarded by mu
}

// Open reads the network namespace and joins every interface in it to a tap of
// its own. After an error nothing of it is left. The caller passes NICs to the
// VMM, calls ReleaseFiles once that has started, and Close after it has ended.
func Open(ctx context.Context, ns NetNS, o Options) (_ *Network, err error) {
	n := &Network{ns: ns, spares: o.Spares}
	err = inside(ctx, ns, func(h *netlink.Handle) error {
		if n.config, err = scan(h); err != nil {
			return err
		}
		if err := n.build(h, max(1, min(o.Queues, maxQueues))); err != nil {
			return errors.Join(err, n.dismantle(h))
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("join network of the pod to its virtual machine: %w", err)
	}
	return n, nil
}

// build makes the devices. Network.mu is not needed yet.
func (n *Network) build(h *netlink.Handle, queues int) error {
	for i := range len(n.config.Interfaces) + n.spares {
		t, err := openTap(h, queues)
		if err != nil {
			return err
		}
		d := &device{tap: t}
		n.devices = append(n.devices, d)
		if i < len(n.config.Interfaces) {
			iface := n.config.Interfaces[i]
			d.mac = n.freeMAC(iface.MAC)
			if err := d.join(h, iface); err != nil {
				return err
			}
		} else {
			d.mac = n.freeMAC(nil)
		}
	}
	return nil
}

// freeMAC returns mac if a device may be made with it, else a random one. Two
// interfaces in different networks may well have the same; devices are told
// apart by theirs.
func (n *Network) freeMAC(mac net.HardwareAddr) net.HardwareAddr {
	for {
		used := slices.ContainsFunc(n.devices, func(d *device) bool { return slices.Equal(d.mac, mac) })
		if mac != nil && !used && mac[0]&1 == 0 {
			return mac
		}
		mac = make(net.HardwareAddr, 6)
		rand.Read(mac)
		mac[0] = mac[0]&^1 | 2 // unicast, locally administered
	}
}

// join connects the device's tap and an interface.
func (d *device) join(h *netlink.Handle, iface Interface) error {
	if err := d.connect(h, iface); err != nil {
		return fmt.Errorf("interface %s: %w", iface.Name, errors.Join(err, d.part(h)))
	}
	return nil
}

func (d *device) connect(h *netlink.Handle, iface Interface) error {
	if err := d.tap.setMTU(h, iface.MTU); err != nil {
		return err
	}
	if err := redirect(h, iface.Index, d.tap.index); err != nil {
		return err
	}
	d.joined = iface // from here on there is something to undo
	if err := redirect(h, d.tap.index, iface.Index); err != nil {
		return fmt.Errorf("tap %s: %w", d.tap.name, err)
	}
	if !iface.AllMulticast {
		if err := h.LinkSetAllmulticastOn(linkAt(iface.Index)); err != nil {
			return fmt.Errorf("receive all multicast: %w", err)
		}
		d.multicast = true
	}
	if d.passNames {
		return d.pass(h)
	}
	return nil
}

// follow brings the device up to date with its interface: another MTU, or
// another interface that has got the same number.
func (d *device) follow(h *netlink.Handle, iface Interface) error {
	found, err := findFilters(h, iface.Index)
	if err != nil {
		return fmt.Errorf("interface %s: %w", iface.Name, err)
	}
	if !found.ours {
		if err := d.part(h); err != nil {
			return err
		}
		return d.join(h, iface)
	}
	if d.joined.MTU == iface.MTU {
		return nil
	}
	if err := d.tap.setMTU(h, iface.MTU); err != nil {
		return fmt.Errorf("interface %s: %w", iface.Name, err)
	}
	d.joined.MTU = iface.MTU
	return nil
}

// part undoes join. What the CNI has deleted meanwhile is no error.
func (d *device) part(h *netlink.Handle) error {
	if d.joined.Index == 0 {
		return nil
	}
	err := errors.Join(d.stopPassing(), removeRedirect(h, d.joined.Index), removeRedirect(h, d.tap.index))
	if d.multicast {
		if e := h.LinkSetAllmulticastOff(linkAt(d.joined.Index)); e != nil && !gone(e) {
			err = errors.Join(err, fmt.Errorf("stop receiving all multicast: %w", e))
		}
	}
	if err != nil {
		return fmt.Errorf("interface %s: %w", d.joined.Name, err)
	}
	d.joined, d.multicast = Interface{}, false
	return nil
}

// Config returns the namespace's configuration as it was at Open or the last
// Update.
func (n *Network) Config() *Config {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.config
}

// NICs returns the virtual machine's network devices. Their files belong to
// the Network and are open until ReleaseFiles.
func (n *Network) NICs() []hypervisor.NIC {
	n.mu.Lock()
	defer n.mu.Unlock()
	var nics []hypervisor.NIC
	for _, d := range n.devices {
		nics = append(nics, hypervisor.NIC{
			MAC: d.mac.String(), Tap: slices.Clone(d.tap.queues), VhostNet: slices.Clone(d.tap.vhost),
		})
	}
	return nics
}

// Request returns what the guest must be told.
func (n *Network) Request() *api.NetworkConfig {
	n.mu.Lock()
	defer n.mu.Unlock()
	devices := make(map[int]net.HardwareAddr)
	for _, d := range n.devices {
		if d.joined.Index != 0 {
			devices[d.joined.Index] = d.mac
		}
	}
	return n.config.request(devices)
}

// ReleaseFiles closes the descriptors of the taps, once the VMM has its own.
// The taps then live as long as the VMM. Idempotent.
func (n *Network) ReleaseFiles() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, d := range n.devices {
		d.tap.closeFiles()
	}
}

// Update reads the network namespace again and joins interfaces that have
// arrived since to spare devices. The guest must then be given Request anew.
// The error is a *LateInterfaceError when there are more of them than spares;
// none is joined then.
func (n *Network) Update(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return errClosed
	}
	err := inside(ctx, n.ns, func(h *netlink.Handle) error {
		cfg, err := scan(h)
		if err != nil {
			return err
		}
		if err := n.admit(h, cfg); err != nil {
			return err
		}
		n.config = cfg
		return nil
	})
	if err != nil {
		return fmt.Errorf("update network of the pod: %w", err)
	}
	return nil
}

var errClosed = errors.New("the pod's network is closed")

// admit joins the interfaces of cfg that are new, or none of them, and follows
// changes of those that are not.
func (n *Network) admit(h *netlink.Handle, cfg *Config) error {
	var free []*device
	known := make(map[int]*device)
	for _, d := range n.devices {
		if d.joined.Index == 0 {
			free = append(free, d)
		} else {
			known[d.joined.Index] = d
		}
	}
	var joined []*device
	for _, iface := range cfg.Interfaces {
		var err error
		switch d := known[iface.Index]; {
		case d != nil:
			err = d.follow(h, iface)
		case len(joined) == len(free):
			err = &LateInterfaceError{Interface: iface.Name, Spares: n.spares}
		default:
			d = free[len(joined)]
			if err = d.join(h, iface); err == nil {
				joined = append(joined, d)
			}
		}
		if err != nil {
			for _, d := range joined {
				err = errors.Join(err, d.part(h))
			}
			return err
		}
	}
	return nil
}

// Close parts interfaces and taps, and deletes the taps. It is for a virtual
// machine that has ended: a VMM whose taps vanish may spin. Interfaces, and
// what they were, stay as the CNI has made them. Idempotent; after an error it
// may be called again.
func (n *Network) Close(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil
	}
	err := inside(ctx, n.ns, n.dismantle)
	if err != nil {
		return fmt.Errorf("part network of the pod from its virtual machine: %w", err)
	}
	n.closed = true
	return nil
}

// dismantle undoes build, and Update.
func (n *Network) dismantle(h *netlink.Handle) error {
	var errs []error
	for _, d := range n.devices {
		d.tap.closeFiles()
		errs = append(errs, d.part(h), d.tap.remove(h))
	}
	errs = append(errs, n.restorePorts())
	return errors.Join(errs...)
}

// Clean removes from the network namespace what a Network has left that was
// not closed because its process died. The virtual machine must have ended.
func Clean(ctx context.Context, ns NetNS) error {
	err := inside(ctx, ns, func(h *netlink.Handle) error {
		links, err := dump(h.LinkList)
		if err != nil {
			return fmt.Errorf("list interfaces: %w", err)
		}
		var errs []error
		for _, l := range links {
			if isOurTap(l) {
				errs = append(errs, removeLink(h, l))
				continue
			}
			errs = append(errs, cleanInterface(h, l))
		}
		return errors.Join(errs...)
	})
	if err != nil {
		return fmt.Errorf("clean network namespace: %w", err)
	}
	return nil
}

// cleanInterface removes our redirect from an interface, if it has one.
func cleanInterface(h *netlink.Handle, l netlink.Link) error {
	found, err := findFilters(h, l.Attrs().Index)
	if err == nil && found.ours {
		err = removeRedirect(h, l.Attrs().Index)
	}
	if err != nil {
		return fmt.Errorf("interface %s: %w", l.Attrs().Name, err)
	}
	return nil
}
