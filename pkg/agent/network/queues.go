package network

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/agent/cpu"
)

// channels is struct ethtool_channels of linux/ethtool.h.
type channels struct {
	cmd                                        uint32
	maxRx, maxTx, maxOther, maxCombined        uint32
	rxCount, txCount, otherCount, combinedUsed uint32
}

// UseQueues lets every network device use a pair of queues for each CPU that
// is online, as far as it has them. Drivers decide that once, at boot, when
// most CPUs may still be offline.
func (n *Network) UseQueues() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.claimed) == 0 {
		return nil
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink socket: %w", err)
	}
	defer h.Close()
	links, err := list(h)
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range links {
		if l.Type() == "device" && n.isClaimed(l) {
			errs = append(errs, useQueues(l.Attrs().Name))
		}
	}
	return errors.Join(errs...)
}

func useQueues(name string) error {
	c := channels{cmd: unix.ETHTOOL_GCHANNELS}
	if err := ethtool(name, &c); err != nil {
		if errors.Is(err, unix.EOPNOTSUPP) {
			return nil
		}
		return fmt.Errorf("interface %s: read queues: %w", name, err)
	}
	if c.maxCombined <= 1 {
		return nil
	}
	online, err := cpu.Online(cpu.Root)
	if err != nil {
		return err
	}
	if want := min(uint32(online), c.maxCombined); want != c.combinedUsed {
		c.cmd, c.combinedUsed = unix.ETHTOOL_SCHANNELS, want
		if err := ethtool(name, &c); err != nil {
			return fmt.Errorf("interface %s: use %d queues: %w", name, want, err)
		}
	}
	return nil
}

// ethtool performs one SIOCETHTOOL request.
func ethtool(name string, c *channels) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request := struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [24 - unsafe.Sizeof(uintptr(0))]byte // sizeof(struct ifreq) is 40
	}{data: unsafe.Pointer(c)}
	copy(request.name[:unix.IFNAMSIZ-1], name)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request)))
	runtime.KeepAlive(c)
	if errno != 0 {
		return errno
	}
	return nil
}
