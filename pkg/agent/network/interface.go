package network

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
)

// iface is an interface as it is to be.
type iface struct {
	device      string // its hardware address when the machine was made
	name        string
	mac         net.HardwareAddr
	mtu         int
	addresses   []*netlink.Addr
	down        bool
	acceptRA    int32
	disableIPv6 bool
}

// dumpAttempts is how often a list is asked for that changed while it was
// handed over.
const dumpAttempts = 8

func list(h *netlink.Handle) ([]netlink.Link, error) {
	for attempt := 1; ; attempt++ {
		links, err := h.LinkList()
		switch {
		case err == nil:
			return links, nil
		case !errors.Is(err, netlink.ErrDumpInterrupted) || attempt == dumpAttempts:
			return nil, fmt.Errorf("list interfaces: %w", err)
		}
	}
}

// identity is the hardware address with which a device was made, if its driver
// says, else the one that it has.
func identity(l netlink.Link) string {
	a := l.Attrs()
	if len(a.PermHWAddr) == 6 {
		return a.PermHWAddr.String()
	}
	return a.HardwareAddr.String()
}

// claim finds the device of each interface. Network.mu is held.
func (n *Network) claim(want []iface, links []netlink.Link) ([]netlink.Link, error) {
	devices := make([]netlink.Link, len(want))
	for i, w := range want {
		if devices[i] = n.lookUp(links, w.device); devices[i] == nil {
			return nil, fmt.Errorf("interface %s: device %s: %w", w.name, w.device, errdefs.ErrNotFound)
		}
	}
	if n.claimed == nil {
		n.claimed = make(map[string]int)
	}
	for i, w := range want {
		n.claimed[w.device] = devices[i].Attrs().Index
	}
	return devices, nil
}

// lookUp finds a device that an earlier call has named by its number, since
// some have lost their first address with that call.
func (n *Network) lookUp(links []netlink.Link, device string) netlink.Link {
	index, claimed := n.claimed[device]
	for _, l := range links {
		if claimed && l.Attrs().Index == index || !claimed && identity(l) == device && !n.isClaimed(l) {
			return l
		}
	}
	return nil
}

func (n *Network) isClaimed(l netlink.Link) bool {
	for _, index := range n.claimed {
		if index == l.Attrs().Index {
			return true
		}
	}
	return false
}

// rename gives each device the name of its interface. Who has that name gets
// another one. devices are some of links, whose names are kept up to date.
func rename(h *netlink.Handle, want []iface, devices, links []netlink.Link) error {
	for i, w := range want {
		if devices[i].Attrs().Name == w.name {
			continue
		}
		for _, l := range links {
			if l.Attrs().Name != w.name {
				continue
			}
			// A number is nobody else's, so this name is free.
			if err := setName(h, l, fmt.Sprintf("vmrt%d", l.Attrs().Index)); err != nil {
				return err
			}
		}
		if err := setName(h, devices[i], w.name); err != nil {
			return err
		}
	}
	return nil
}

// setName renames a device, which must be down for that.
func setName(h *netlink.Handle, l netlink.Link, name string) error {
	a := l.Attrs()
	up := a.Flags&net.FlagUp != 0
	err := error(nil)
	if up {
		err = h.LinkSetDown(l)
	}
	if err == nil {
		err = h.LinkSetName(l, name)
	}
	if err == nil && up {
		err = h.LinkSetUp(l)
	}
	if err != nil {
		return fmt.Errorf("rename interface %s to %s: %w", a.Name, name, err)
	}
	a.Name = name
	return nil
}

// configure gives a device everything but its name.
func (i *iface) configure(h *netlink.Handle, l netlink.Link) error {
	a := l.Attrs()
	if !bytes.Equal(a.HardwareAddr, i.mac) {
		if err := h.LinkSetHardwareAddr(l, i.mac); err != nil {
			return fmt.Errorf("set hardware address %s: %w", i.mac, err)
		}
	}
	if a.MTU != i.mtu {
		if err := h.LinkSetMTU(l, i.mtu); err != nil {
			return fmt.Errorf("set MTU %d: %w", i.mtu, err)
		}
	}
	if err := i.setSysctls(); err != nil {
		return err
	}
	if err := useQueues(i.name); err != nil {
		return err
	}
	if !i.down {
		if err := h.LinkSetUp(l); err != nil {
			return fmt.Errorf("bring up: %w", err)
		}
	}
	for _, addr := range i.addresses {
		if err := h.AddrReplace(l, addr); err != nil {
			return fmt.Errorf("add address %s: %w", addr.IPNet, err)
		}
	}
	return nil
}

// setSysctls decides about IPv6 before the interface comes up. A kernel without
// IPv6 has none of the settings.
func (i *iface) setSysctls() error {
	disable := "0"
	if i.disableIPv6 {
		disable = "1"
	}
	for _, s := range []struct{ name, value string }{
		{"disable_ipv6", disable},
		{"accept_ra", strconv.Itoa(int(i.acceptRA))},
		// Nor does the link-local address wait for a second.
		{"accept_dad", "0"},
	} {
		err := os.WriteFile("/proc/sys/net/ipv6/conf/"+i.name+"/"+s.name, []byte(s.value), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("set %s to %s: %w", s.name, s.value, err)
		}
	}
	return nil
}
