//go:build linux

package portforward

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// namespace is what Start needs of a pod's network namespace.
type namespace struct {
	file *os.File
	// listeners are IPv4's and, where the kernel has IPv6, that one's.
	listeners []*net.TCPListener
	// taken are the ports on whose loopback something listened before.
	taken []uint16
}

// enter looks at the calling thread's network namespace and listens there.
func enter() (_ *namespace, err error) {
	ns := &namespace{}
	if ns.file, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			ns.closeListeners()
			ns.file.Close()
		}
	}()
	if err := notOwn(ns.file); err != nil {
		return nil, err
	}
	if ns.taken, err = takenPorts(); err != nil {
		return nil, fmt.Errorf("ports in use: %w", err)
	}
	for _, l := range []struct{ network, address string }{{"tcp4", "127.0.0.1:0"}, {"tcp6", "[::1]:0"}} {
		listener, err := listen(l.network, l.address)
		if errors.Is(err, unix.EAFNOSUPPORT) && len(ns.listeners) > 0 {
			break // a kernel without IPv6
		}
		if err != nil {
			return nil, err
		}
		ns.listeners = append(ns.listeners, listener)
	}
	return ns, nil
}

func (ns *namespace) closeListeners() {
	for _, l := range ns.listeners {
		l.Close()
	}
}

// notOwn returns an error if netns is the process's own network namespace.
func notOwn(netns *os.File) error {
	theirs, err := netns.Stat()
	if err != nil {
		return err
	}
	own, err := os.Stat("/proc/self/ns/net")
	if err != nil {
		return err
	}
	if os.SameFile(own, theirs) {
		return errors.New("the pod has the host's network")
	}
	return nil
}

// listen opens a listener that works before its address exists: IPv6 may be
// disabled and lo be down until later. A socket of MPTCP, which Go otherwise
// listens with, cannot be in a socket map. A loopback needs no keep-alive.
func listen(network, address string) (*net.TCPListener, error) {
	cfg := net.ListenConfig{KeepAlive: -1, Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) {
			if network == "tcp6" {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1)
			} else {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1)
			}
		}); cerr != nil {
			return cerr
		}
		return os.NewSyscallError("setsockopt", err)
	}}
	cfg.SetMultipathTCP(false)
	l, err := cfg.Listen(context.Background(), network, address)
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}
