//go:build linux

package network

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tapPrefix starts the names of our taps.
const tapPrefix = "vmrt-tap"

// isOurTap reports whether an interface is the tap of a virtual machine.
func isOurTap(l netlink.Link) bool {
	return l.Type() == "tuntap" && strings.HasPrefix(l.Attrs().Name, tapPrefix)
}

// tap is a tap device. It exists as long as one of its descriptors is open,
// ours or the VMM's.
type tap struct {
	name   string
	index  int
	queues []*os.File
	vhost  []*os.File // one for each queue, or none
}

// openTap makes a tap and brings it up. It is called in the network namespace.
func openTap(h *netlink.Handle, queues int) (_ *tap, err error) {
	t := &tap{}
	defer func() {
		if err != nil {
			t.closeFiles()
		}
	}()
	// The kernel puts the first free number in.
	name := tapPrefix + "%d"
	for range queues {
		var f *os.File
		if f, name, err = openQueue(name, queues > 1); err != nil {
			return nil, fmt.Errorf("make tap: %w", err)
		}
		t.queues = append(t.queues, f)
	}
	t.name = name
	// Frames are for the guest; the host's own must not get among them.
	if err := os.WriteFile(sysctlPath(name, "disable_ipv6"), []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("make tap: %w", err)
	}
	link, err := h.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("tap %s: %w", name, err)
	}
	t.index = link.Attrs().Index
	if err := h.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("bring up tap %s: %w", name, err)
	}
	t.vhost, err = openVhost(queues)
	return t, err
}

// openQueue opens one queue of the tap called name, which may be a pattern,
// and returns the tap's name.
func openQueue(name string, multi bool) (*os.File, string, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, "", &os.PathError{Op: "open", Path: "/dev/net/tun", Err: err}
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		// With a header in front of each frame checksums and segments stay
		// undone from one guest to the other.
		flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if multi {
			flags |= unix.IFF_MULTI_QUEUE
		}
		request.SetUint16(flags)
		err = os.NewSyscallError("TUNSETIFF "+name, unix.IoctlIfreq(fd, unix.TUNSETIFF, request))
	}
	if err != nil {
		unix.Close(fd)
		return nil, "", err
	}
	return os.NewFile(uintptr(fd), request.Name()), request.Name(), nil
}

// openVhost opens the kernel's virtio-net back end once for each queue. It
// returns none where the kernel has none.
func openVhost(queues int) ([]*os.File, error) {
	var files []*os.File
	for range queues {
		f, err := os.OpenFile("/dev/vhost-net", os.O_RDWR, 0)
		if err != nil {
			closeAll(files)
			// A node whose module is missing says ENODEV or ENXIO.
			if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
				return nil, nil
			}
			return nil, err
		}
		files = append(files, f)
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// closeFiles closes our descriptors. Idempotent.
func (t *tap) closeFiles() {
	closeAll(t.queues)
	closeAll(t.vhost)
	t.queues, t.vhost = nil, nil
}

// maxTapMTU is what a tap takes (drivers/net/tun.c, MAX_MTU). Redirected
// frames may be larger.
const maxTapMTU = 65535 - 14

// setMTU gives the tap the size of the interface's frames.
func (t *tap) setMTU(h *netlink.Handle, mtu int) error {
	mtu = min(mtu, maxTapMTU)
	if err := h.LinkSetMTU(t.link(), mtu); err != nil {
		return fmt.Errorf("set MTU of tap %s to %d: %w", t.name, mtu, err)
	}
	return nil
}

func (t *tap) link() netlink.Link {
	return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: t.index, Name: t.name}}
}

// remove deletes the tap, whoever still has it open.
func (t *tap) remove(h *netlink.Handle) error {
	return removeLink(h, t.link())
}

func removeLink(h *netlink.Handle, l netlink.Link) error {
	if err := h.LinkDel(l); err != nil && !gone(err) {
		return fmt.Errorf("delete tap %s: %w", l.Attrs().Name, err)
	}
	return nil
}

// gone reports whether an error says that the interface is not there.
func gone(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.As(err, &notFound) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO)
}
