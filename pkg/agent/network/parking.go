package network

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// parking is a network namespace for devices that have no interface yet.
type parking struct {
	file   *os.File
	handle *netlink.Handle
}

// openParking makes the namespace. It lives as long as the agent.
func openParking() (*parking, error) {
	type result struct {
		p   *parking
		err error
	}
	made := make(chan result)
	go func() {
		// The thread is never unlocked: it ends with this function.
		runtime.LockOSThread()
		var r result
		if r.err = unix.Unshare(unix.CLONE_NEWNET); r.err == nil {
			r.p = &parking{}
			r.p.file, r.err = os.Open("/proc/thread-self/ns/net")
		}
		made <- r
	}()
	r := <-made
	if r.err != nil {
		return nil, fmt.Errorf("make network namespace: %w", r.err)
	}
	h, err := netlink.NewHandleAt(netns.NsHandle(r.p.file.Fd()), unix.NETLINK_ROUTE)
	if err == nil {
		err = h.SetSocketTimeout(timeout)
	}
	if err != nil {
		r.p.file.Close()
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	r.p.handle = h
	return r.p, nil
}

// park hides the hardware that no call has named. Network.mu is held.
func (n *Network) park(h *netlink.Handle) error {
	links, err := list(h)
	if err != nil {
		return err
	}
	for _, l := range links {
		a := l.Attrs()
		// netlink's name for hardware is "device". Whatever a container may
		// have made is of another type.
		if l.Type() != "device" || a.EncapType != "ether" || a.Flags&net.FlagLoopback != 0 || n.isClaimed(l) {
			continue
		}
		if n.parking == nil {
			if n.parking, err = openParking(); err != nil {
				return err
			}
		}
		if err := h.LinkSetNsFd(l, int(n.parking.file.Fd())); err != nil {
			return fmt.Errorf("hide interface %s: %w", a.Name, err)
		}
	}
	return nil
}

// unpark brings a device back, nil if it is not there. Network.mu is held.
func (n *Network) unpark(h *netlink.Handle, device string) (netlink.Link, error) {
	if n.parking == nil {
		return nil, nil
	}
	links, err := list(n.parking.handle)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(links, func(l netlink.Link) bool { return identity(l) == device })
	if i < 0 {
		return nil, nil
	}
	here, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	defer here.Close()
	if err := n.parking.handle.LinkSetNsFd(links[i], int(here.Fd())); err != nil {
		return nil, fmt.Errorf("bring back device %s: %w", device, err)
	}
	if links, err = list(h); err != nil {
		return nil, err
	}
	return n.lookUp(links, device), nil
}
