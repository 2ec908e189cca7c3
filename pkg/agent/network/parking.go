package network

import (
	"fmt"
	"net"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/thread"
)

// parking is a network namespace for devices that have no interface yet.
type parking struct {
	file   *os.File
	handle *netlink.Handle
}

// openParking makes the namespace. It lives as long as the agent.
func openParking() (*parking, error) {
	p := &parking{}
	// Containers join the network namespace of the agent's first thread.
	err := thread.Run(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", err)
		}
		if p.file, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return fmt.Errorf("make network namespace: %w", err)
		}
		if p.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err == nil {
			err = p.handle.SetSocketTimeout(timeout)
		}
		if err != nil {
			return fmt.Errorf("netlink socket: %w", err)
		}
		return nil
	})
	if err != nil {
		if p.file != nil {
			p.file.Close()
		}
		if p.handle != nil {
			p.handle.Close()
		}
		return nil, err
	}
	return p, nil
}

// park hides the hardware that no call has named, and returns the links that
// are left. Network.mu is held.
func (n *Network) park(h *netlink.Handle, links []netlink.Link) ([]netlink.Link, error) {
	var left []netlink.Link
	for _, l := range links {
		a := l.Attrs()
		// netlink's name for hardware is "device". Whatever a container may
		// have made is of another type.
		if l.Type() != "device" || a.EncapType != "ether" || a.Flags&net.FlagLoopback != 0 || n.isClaimed(l) {
			left = append(left, l)
			continue
		}
		if n.parking == nil {
			var err error
			if n.parking, err = openParking(); err != nil {
				return nil, err
			}
		}
		if err := h.LinkSetNsFd(l, int(n.parking.file.Fd())); err != nil {
			return nil, fmt.Errorf("hide interface %s: %w", a.Name, err)
		}
	}
	return left, nil
}

// bringBack gets the devices that are missing from links out of the parking,
// and returns the links that there are then. Network.mu is held.
func (n *Network) bringBack(h *netlink.Handle, want []iface, links []netlink.Link) ([]netlink.Link, error) {
	moved := false
	for _, w := range want {
		if n.parking == nil || n.lookUp(links, w.device) != nil {
			continue
		}
		if err := n.unpark(w.device); err != nil {
			return nil, fmt.Errorf("interface %s: bring back device %s: %w", w.name, w.device, err)
		}
		moved = true
	}
	if !moved {
		return links, nil
	}
	return list(h)
}

// unpark brings a device back, if it is there.
func (n *Network) unpark(device string) error {
	parked, err := list(n.parking.handle)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(parked, func(l netlink.Link) bool { return identity(l) == device })
	if i < 0 {
		return nil
	}
	here, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer here.Close()
	return n.parking.handle.LinkSetNsFd(parked[i], int(here.Fd()))
}
