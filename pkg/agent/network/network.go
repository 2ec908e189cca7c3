// Package network makes the guest's network what the host says that the pod's
// is: interfaces with names, hardware addresses, sizes and IP addresses, then
// routes, permanent neighbours and routing rules.
//
// Contract. Configure adds: what an earlier call has made stays, and the same
// configuration again changes nothing. A network device is known by the
// hardware address with which the virtual machine was made, whatever address
// and name it has been given since. Devices that no call has named, which wait
// for interfaces that come later, are kept in a network namespace of their own,
// where no container sees them.
//
// Concurrency: methods may be called from any goroutine; each runs to its end
// before the next.
//
// Not guaranteed: that nothing was done when an error is returned. What
// containers change meanwhile is theirs.
package network

import (
	"fmt"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
)

// timeout bounds every answer of the kernel.
const timeout = 10 * time.Second

// Network is the network stack of the namespace in which its methods are
// called. The zero value is ready to use.
type Network struct {
	mu      sync.Mutex
	claimed map[string]int // guarded by mu; numbers of the devices that were named
	parking *parking       // guarded by mu; nil until something was parked
}

// Configure makes what cfg describes. Errors name the object, and are of the
// errdefs kind ErrInvalidArgument where cfg makes no sense and ErrNotFound
// where it names a device that the machine does not have.
func (n *Network) Configure(cfg *api.NetworkConfig) error {
	c, err := parse(cfg)
	if err != nil {
		return fmt.Errorf("network configuration: %w", err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	h, err := openHandle()
	if err != nil {
		return err
	}
	defer h.Close()
	return n.apply(h, c)
}

// openHandle opens a socket in the calling thread's network namespace.
func openHandle() (*netlink.Handle, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	if err := h.SetSocketTimeout(timeout); err != nil {
		h.Close()
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	return h, nil
}

func (n *Network) apply(h *netlink.Handle, c *config) error {
	links, err := list(h)
	if err != nil {
		return err
	}
	if links, err = n.bringBack(h, c.interfaces, links); err != nil {
		return err
	}
	devices, err := n.claim(c.interfaces, links)
	if err != nil {
		return err
	}
	if links, err = n.park(h, links); err != nil {
		return err
	}
	if err := rename(h, c.interfaces, devices, links); err != nil {
		return err
	}
	for i, want := range c.interfaces {
		if err := want.configure(h, devices[i]); err != nil {
			return fmt.Errorf("interface %s: %w", want.name, err)
		}
	}
	if err := bringUpLoopback(h); err != nil {
		return err
	}
	index := make(map[string]int, len(links))
	for _, l := range links {
		index[l.Attrs().Name] = l.Attrs().Index
	}
	for _, r := range c.routes {
		if err := r.add(h, index); err != nil {
			return fmt.Errorf("add %v: %w", &r, err)
		}
	}
	for _, p := range c.neighbours {
		if err := p.add(h, index); err != nil {
			return fmt.Errorf("interface %s: add neighbour %s at %s: %w", p.iface, p.ip, p.mac, err)
		}
	}
	for _, r := range c.rules {
		if err := addRule(h, r); err != nil {
			return fmt.Errorf("add routing rule %d: %w", r.Priority, err)
		}
	}
	return nil
}

func bringUpLoopback(h *netlink.Handle) error {
	lo, err := h.LinkByName("lo")
	if err == nil {
		err = h.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("bring up loopback: %w", err)
	}
	return nil
}
