//go:build linux

package portforward

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxTaken bounds the ports that the program leaves alone.
const maxTaken = 4096

// needDiag is what a kernel lacks that does not list its listening sockets.
// /proc/net/tcp would: but it walks all connections of the host for that.
const needDiag = "sock_diag of TCP (CONFIG_INET_TCP_DIAG)"

// takenPorts returns the TCP ports on which something listens at loopback or
// at any address in the calling thread's network namespace.
func takenPorts() ([]uint16, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, unsupported(os.NewSyscallError("socket", err), needDiag)
	}
	defer unix.Close(fd)
	timeout := unix.NsecToTimeval(diagTimeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return nil, os.NewSyscallError("setsockopt", err)
	}
	seen := make(map[uint16]bool)
	var ports []uint16
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		addrs, err := listening(fd, family)
		if err != nil {
			return nil, unsupported(err, needDiag)
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

// diagTimeout bounds the wait for a part of the answer, which the kernel makes
// at once.
const diagTimeout = 5 * time.Second

// Of include/uapi/linux/inet_diag.h and include/net/tcp_states.h: the sizes of
// struct inet_diag_req_v2 and of the beginning of struct inet_diag_msg up to
// the end of its id, and where in that are the source port and address, in
// network byte order.
const (
	diagRequest  = 56
	diagAnswer   = 52
	offSource    = 4
	offSourceIP  = 8
	stateListen  = 10
	offStates    = 4
	headerLength = unix.SizeofNlMsghdr
)

// listening returns where TCP sockets of the family listen in the namespace of
// the netlink socket fd.
func listening(fd int, family uint8) ([]netip.AddrPort, error) {
	b := make([]byte, headerLength+diagRequest)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint16(b[4:], unix.SOCK_DIAG_BY_FAMILY)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	b[headerLength], b[headerLength+1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[headerLength+offStates:], 1<<stateListen)
	if err := unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, os.NewSyscallError("send to sock_diag", err)
	}
	var all []netip.AddrPort
	for buf := make([]byte, 32<<10); ; {
		n, err := recv(fd, buf)
		if err != nil {
			return nil, err
		}
		messages, err := syscall.ParseNetlinkMessage(buf[:n])
		if err != nil {
			return nil, fmt.Errorf("answer of sock_diag: %w", err)
		}
		for _, m := range messages {
			switch m.Header.Type {
			case unix.NLMSG_DONE:
				return all, nil
			case unix.NLMSG_ERROR:
				return nil, fmt.Errorf("sock_diag: %w", diagError(m.Data))
			case unix.SOCK_DIAG_BY_FAMILY:
				a, err := diagSource(m.Data)
				if err != nil {
					return nil, err
				}
				all = append(all, a)
			}
		}
	}
}

func recv(fd int, buf []byte) (int, error) {
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != unix.EINTR {
			return n, os.NewSyscallError("receive from sock_diag", err)
		}
	}
}

// diagError returns the error of an NLMSG_ERROR, which begins with the negated
// errno.
func diagError(b []byte) error {
	if len(b) < 4 {
		return unix.EBADMSG
	}
	return unix.Errno(-int32(binary.NativeEndian.Uint32(b)))
}

// diagSource returns the source of a struct inet_diag_msg.
func diagSource(b []byte) (netip.AddrPort, error) {
	if len(b) < diagAnswer {
		return netip.AddrPort{}, fmt.Errorf("sock_diag answers with %d bytes: want at least %d", len(b), diagAnswer)
	}
	ip := netip.AddrFrom4([4]byte(b[offSourceIP:]))
	if b[0] == unix.AF_INET6 {
		ip = netip.AddrFrom16([16]byte(b[offSourceIP:]))
	}
	return netip.AddrPortFrom(ip, binary.BigEndian.Uint16(b[offSource:])), nil
}
