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
		p.handle, err = openHandle()
		return err
	})
	if err != nil {
		if p.file != nil {
			p.file.Close()
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
		if !isHardware(l) || n.isClaimed(l) {
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
			return nil, fmt.Errorf("hide interface %s: %w", l.Attrs().Name, err)
		}
	}
	return left, nil
}

// isHardware tells the machine's network devices from the loopback and from
// whatever a container may have made: netlink's name for them is "device".
func isHardware(l netlink.Link) bool {
	a := l.Attrs()
	return l.Type() == "device" && a.EncapType == "ether" && a.Flags&net.FlagLoopback == 0
}

// MoveHardware moves the machine's network devices from the calling thread's
// network namespace to another.
func MoveHardware(netns *os.File) error {
	h, err := openHandle()
	if err != nil {
		return err
	}
	defer h.Close()
	links, err := list(h)
	if err != nil {
		return err
	}
	for _, l := range links {
		if !isHardware(l) {
			continue
		}
		if err := h.LinkSetNsFd(l, int(netns.Fd())); err != nil {
			return fmt.Errorf("move interface %s: %w", l.Attrs().Name, err)
		}
	}
	return nil
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
