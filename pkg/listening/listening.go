//go:build linux

// Package listening lists the TCP sockets that listen in a network namespace.
// Both sides of a virtual machine use it.
//
// Contract. List asks the kernel by sock_diag(7), which walks the listening
// sockets alone; /proc/net/tcp would walk all connections. It may be called
// from any goroutine.
//
// Not guaranteed: that a list is of one moment where sockets come and go.
package listening

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Socket is where a TCP socket listens. It is comparable.
type Socket struct {
	// Addr has no zone, and an IPv4 address is none of IPv6.
	Addr netip.AddrPort
	// V6Only: a socket at any IPv6 address takes no IPv4 connections.
	V6Only bool
}

// String is the address.
func (s Socket) String() string { return s.Addr.String() }

// List returns the sockets that listen in the calling thread's network
// namespace. Each is there once, however many processes share its address.
func List() ([]Socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	timeout := unix.NsecToTimeval(diagTimeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return nil, os.NewSyscallError("setsockopt", err)
	}
	seen := make(map[Socket]bool)
	var all []Socket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		sockets, err := dump(fd, family)
		if err != nil {
			return nil, err
		}
		for _, s := range sockets {
			if !seen[s] {
				seen[s] = true
				all = append(all, s)
			}
		}
	}
	return all, nil
}

// diagTimeout bounds the wait for a part of the answer, which the kernel makes
// at once.
const diagTimeout = 5 * time.Second

// Of include/uapi/linux/inet_diag.h and include/net/tcp_states.h: the sizes of
// struct inet_diag_req_v2 and of struct inet_diag_msg, after which come
// attributes, and where in the second are the source port and address, in
// network byte order.
const (
	diagRequest  = 56
	diagAnswer   = 72
	offSource    = 4
	offSourceIP  = 8
	stateListen  = 10
	offStates    = 4
	diagV6Only   = 11 // INET_DIAG_SKV6ONLY: a byte, for IPv6 sockets
	headerLength = unix.SizeofNlMsghdr
)

// dump returns where TCP sockets of the family listen in the namespace of the
// netlink socket fd.
func dump(fd int, family uint8) ([]Socket, error) {
	b := make([]byte, headerLength+diagRequest)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint16(b[4:], unix.SOCK_DIAG_BY_FAMILY)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	b[headerLength], b[headerLength+1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[headerLength+offStates:], 1<<stateListen)
	if err := unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, os.NewSyscallError("send to sock_diag", err)
	}
	var all []Socket
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
				s, err := decode(m.Data)
				if err != nil {
					return nil, err
				}
				all = append(all, s)
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

// decode reads a struct inet_diag_msg and its attributes.
func decode(b []byte) (Socket, error) {
	if len(b) < diagAnswer {
		return Socket{}, fmt.Errorf("sock_diag answers with %d bytes: want at least %d", len(b), diagAnswer)
	}
	port := binary.BigEndian.Uint16(b[offSource:])
	if b[0] != unix.AF_INET6 {
		return Socket{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[offSourceIP:])), port)}, nil
	}
	ip := netip.AddrFrom16([16]byte(b[offSourceIP:])).Unmap()
	s := Socket{Addr: netip.AddrPortFrom(ip, port)}
	if !ip.IsUnspecified() {
		return s, nil
	}
	for rest := b[diagAnswer:]; len(rest) >= unix.SizeofNlAttr; {
		size := int(binary.NativeEndian.Uint16(rest))
		if size < unix.SizeofNlAttr || size > len(rest) {
			return Socket{}, fmt.Errorf("sock_diag answers with an attribute of %d bytes in %d", size, len(rest))
		}
		if binary.NativeEndian.Uint16(rest[2:]) == diagV6Only && size > unix.SizeofNlAttr {
			s.V6Only = rest[unix.SizeofNlAttr] != 0
		}
		rest = rest[min(len(rest), (size+3)&^3):]
	}
	return s, nil
}
