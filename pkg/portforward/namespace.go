//go:build linux

package portforward

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
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

// maxTaken bounds the ports that the program leaves alone.
const maxTaken = 4096

// takenPorts returns the TCP ports on which something listens at loopback or
// at any address in the calling thread's network namespace.
func takenPorts() ([]uint16, error) {
	seen := make(map[uint16]bool)
	var ports []uint16
	for _, name := range []string{"tcp", "tcp6"} {
		f, err := os.Open("/proc/thread-self/net/" + name)
		if errors.Is(err, os.ErrNotExist) && name == "tcp6" {
			break
		}
		if err != nil {
			return nil, err
		}
		addrs, err := listening(f)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.Name(), err)
		}
		for _, a := range addrs {
			ip := a.Addr().Unmap()
			if (ip.IsLoopback() || ip.IsUnspecified()) && !seen[a.Port()] {
				seen[a.Port()] = true
				ports = append(ports, a.Port())
			}
		}
	}
	if len(ports) > maxTaken {
		return nil, fmt.Errorf("%d; at most %d can be left alone", len(ports), maxTaken)
	}
	return ports, nil
}

// stateListen is TCP_LISTEN (include/net/tcp_states.h) in /proc/net/tcp.
const stateListen = "0A"

// listening returns the local addresses of the listening sockets in a table as
// /proc/net/tcp is (Documentation/networking/proc_net_tcp.rst).
func listening(r io.Reader) ([]netip.AddrPort, error) {
	var all []netip.AddrPort
	lines := bufio.NewScanner(r)
	lines.Scan() // the heading
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 4 {
			return nil, fmt.Errorf("line %q is short", lines.Text())
		}
		if f[3] != stateListen {
			continue
		}
		a, err := parseAddress(f[1])
		if err != nil {
			return nil, err
		}
		all = append(all, a)
	}
	return all, lines.Err()
}

// parseAddress parses "0100007F:1F90": words of the address in the machine's
// byte order and the port.
func parseAddress(s string) (netip.AddrPort, error) {
	host, port, _ := strings.Cut(s, ":")
	ip, err := hex.DecodeString(host)
	n, perr := strconv.ParseUint(port, 16, 16)
	if err != nil || perr != nil || len(ip) != 4 && len(ip) != 16 {
		return netip.AddrPort{}, fmt.Errorf("address %q is malformed", s)
	}
	for w := ip; len(w) > 0; w = w[4:] {
		binary.NativeEndian.PutUint32(w, binary.BigEndian.Uint32(w))
	}
	addr, _ := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(addr, uint16(n)), nil
}
