package api

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"syscall"
)

// A dial connection starts with a request: what address to connect to on the
// other side. The host makes them to PortDial, the guest to the host's port
// once it has been told of something there (MirrorPorts, ServeNames). The other
// side connects and answers.
//
// With TCP, after an answer of success and only then, bytes follow as they
// are in both directions. Either side half-closes its stream after the last
// byte. Closing the connection whole before the stream towards oneself has
// ended resets it.
//
// With UDP datagrams follow in both directions (WriteDatagram), until either
// side closes the connection.

// MaxDialError bounds the text of a failed dial, in bytes.
const MaxDialError = 255

// The first byte of the answer to a dial request.
const (
	dialConnected = 'k'
	dialRefused   = 'r' // ECONNREFUSED
	dialFailed    = 'e' // one byte length and a text follow
)

// Networks of a dial request.
const (
	TCP = "tcp"
	UDP = "udp"
)

// dialUDP in a request's first byte asks for UDP.
const dialUDP = 0x10

// WriteDialRequest asks for a connection to an address by TCP or UDP. It must
// come first. Format: one byte, 4 or 6, plus 16 for UDP, then the address in as
// many bytes as it has, then the port as a big-endian uint16.
func WriteDialRequest(w io.Writer, network string, to netip.AddrPort) error {
	ip := to.Addr()
	if !ip.IsValid() || ip.Is4In6() || ip.Zone() != "" || ip.IsUnspecified() || to.Port() == 0 {
		return fmt.Errorf("dial request for %s: want an address and a port", to)
	}
	kind := byte(6)
	if ip.Is4() {
		kind = 4
	}
	switch network {
	case TCP:
	case UDP:
		kind |= dialUDP
	default:
		return fmt.Errorf("dial request for network %q: want %s or %s", network, TCP, UDP)
	}
	b := append([]byte{kind}, ip.AsSlice()...)
	_, err := w.Write(binary.BigEndian.AppendUint16(b, to.Port()))
	return err
}

// ReadDialRequest reads what WriteDialRequest wrote.
func ReadDialRequest(r io.Reader) (network string, to netip.AddrPort, err error) {
	var b [1 + 16 + 2]byte
	if _, err := io.ReadFull(r, b[:1]); err != nil {
		return "", to, fmt.Errorf("read dial request: %w", err)
	}
	network = TCP
	if b[0]&dialUDP != 0 {
		network = UDP
	}
	size := map[byte]int{4: 4, 6: 16}[b[0]&^dialUDP]
	if size == 0 {
		return "", to, fmt.Errorf("dial request of kind %#x: want an IP version, 4 or 6, plus %#x for UDP", b[0], dialUDP)
	}
	rest := b[1 : 1+size+2]
	if _, err := io.ReadFull(r, rest); err != nil {
		return "", to, fmt.Errorf("read dial request: %w", err)
	}
	ip, _ := netip.AddrFromSlice(rest[:size])
	to = netip.AddrPortFrom(ip, binary.BigEndian.Uint16(rest[size:]))
	if ip.Is4In6() || ip.IsUnspecified() || to.Port() == 0 {
		return "", netip.AddrPort{}, fmt.Errorf("dial request for %s: want an address and a port", to)
	}
	return network, to, nil
}

// MaxDatagram bounds a datagram, in bytes.
const MaxDatagram = 1<<16 - 1

// WriteDatagram writes a datagram behind its length, a big-endian uint16, in
// one write.
func WriteDatagram(w io.Writer, b []byte) error {
	if len(b) > MaxDatagram {
		return fmt.Errorf("datagram of %d bytes: at most %d", len(b), MaxDatagram)
	}
	_, err := w.Write(append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(b)), uint16(len(b))), b...))
	return err
}

// ReadDatagram reads what WriteDatagram wrote.
func ReadDatagram(r io.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, fmt.Errorf("read datagram: %w", err)
	}
	b := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, fmt.Errorf("read datagram: %w", err)
	}
	return b, nil
}

// WriteDialAnswer answers a dial request: with success if failure is nil.
func WriteDialAnswer(w io.Writer, failure error) error {
	var b []byte
	switch {
	case failure == nil:
		b = append(b, dialConnected)
	case errors.Is(failure, syscall.ECONNREFUSED):
		b = append(b, dialRefused)
	default:
		text := failure.Error()
		text = text[:min(len(text), MaxDialError)]
		b = append(append(b, dialFailed, byte(len(text))), text...)
	}
	_, err := w.Write(b)
	return err
}

// ReadDialAnswer reads what WriteDialAnswer wrote and returns the failure,
// which is syscall.ECONNREFUSED where nobody listens. Text of the
// other side's is quoted in ASCII.
func ReadDialAnswer(r io.Reader) error {
	var b [1]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return fmt.Errorf("read answer: %w", err)
	}
	switch b[0] {
	case dialConnected:
		return nil
	case dialRefused:
		return syscall.ECONNREFUSED
	case dialFailed:
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return fmt.Errorf("read answer: %w", err)
		}
		text := make([]byte, b[0])
		if _, err := io.ReadFull(r, text); err != nil {
			return fmt.Errorf("read answer: %w", err)
		}
		return fmt.Errorf("the other side says %+q", text)
	}
	return fmt.Errorf("answer %#x is unknown", b[0])
}
