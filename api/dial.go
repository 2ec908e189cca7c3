package api

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"syscall"
)

// A dial connection starts with a request: what TCP address to connect to on
// the other side. The host makes them to PortDial, the guest to the host's port
// once it has been told of ports there (MirrorPorts). The other side connects
// and answers; after an answer of success, and only then, bytes follow as they
// are in both directions. Either side half-closes its stream after the last
// byte. Closing the connection whole before the stream towards oneself has
// ended resets it.

// MaxDialError bounds the text of a failed dial, in bytes.
const MaxDialError = 255

// The first byte of the answer to a dial request.
const (
	dialConnected = 'k'
	dialRefused   = 'r' // ECONNREFUSED
	dialFailed    = 'e' // one byte length and a text follow
)

// WriteDialRequest asks for a connection to an address. It must come first.
// Format: one byte, 4 or 6, then the address in as many bytes as it has, then
// the port as a big-endian uint16.
func WriteDialRequest(w io.Writer, to netip.AddrPort) error {
	ip := to.Addr()
	if !ip.IsValid() || ip.Is4In6() || ip.Zone() != "" || ip.IsUnspecified() || to.Port() == 0 {
		return fmt.Errorf("dial request for %s: want an address and a port", to)
	}
	version := byte(6)
	if ip.Is4() {
		version = 4
	}
	b := append([]byte{version}, ip.AsSlice()...)
	_, err := w.Write(binary.BigEndian.AppendUint16(b, to.Port()))
	return err
}

// ReadDialRequest reads what WriteDialRequest wrote.
func ReadDialRequest(r io.Reader) (netip.AddrPort, error) {
	var b [1 + 16 + 2]byte
	if _, err := io.ReadFull(r, b[:1]); err != nil {
		return netip.AddrPort{}, fmt.Errorf("read dial request: %w", err)
	}
	size := map[byte]int{4: 4, 6: 16}[b[0]]
	if size == 0 {
		return netip.AddrPort{}, fmt.Errorf("dial request for IP version %d: want 4 or 6", b[0])
	}
	rest := b[1 : 1+size+2]
	if _, err := io.ReadFull(r, rest); err != nil {
		return netip.AddrPort{}, fmt.Errorf("read dial request: %w", err)
	}
	ip, _ := netip.AddrFromSlice(rest[:size])
	to := netip.AddrPortFrom(ip, binary.BigEndian.Uint16(rest[size:]))
	if ip.Is4In6() || ip.IsUnspecified() || to.Port() == 0 {
		return netip.AddrPort{}, fmt.Errorf("dial request for %s: want an address and a port", to)
	}
	return to, nil
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
