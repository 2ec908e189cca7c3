package api

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"syscall"
)

// A dial connection is one that the host makes to PortDial. It starts with a
// request: what to connect to on the guest's loopback. The agent connects and
// answers; after an answer of success, and only then, bytes follow as they are
// in both directions. Either side half-closes its stream after the last byte.
// Closing the connection whole before the stream towards oneself has ended
// resets it.

// Networks of a dial request, which are names of package net: 127.0.0.1 and
// ::1 respectively.
const (
	DialTCP4 = "tcp4"
	DialTCP6 = "tcp6"
)

// MaxDialError bounds the text of a failed dial, in bytes.
const MaxDialError = 255

// The first byte of the answer to a dial request.
const (
	dialConnected = 'k'
	dialRefused   = 'r' // ECONNREFUSED
	dialFailed    = 'e' // one byte length and a text follow
)

// WriteDialRequest asks for a connection to port. It must come first.
// Format: one byte, 4 or 6, then the port as a big-endian uint16.
func WriteDialRequest(w io.Writer, network string, port uint16) error {
	var b []byte
	switch network {
	case DialTCP4:
		b = append(b, 4)
	case DialTCP6:
		b = append(b, 6)
	default:
		return fmt.Errorf("dial request for network %q: want %s or %s", network, DialTCP4, DialTCP6)
	}
	if port == 0 {
		return errors.New("dial request for port 0")
	}
	_, err := w.Write(binary.BigEndian.AppendUint16(b, port))
	return err
}

// ReadDialRequest reads what WriteDialRequest wrote.
func ReadDialRequest(r io.Reader) (network string, port uint16, err error) {
	var b [3]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return "", 0, fmt.Errorf("read dial request: %w", err)
	}
	switch b[0] {
	case 4:
		network = DialTCP4
	case 6:
		network = DialTCP6
	default:
		return "", 0, fmt.Errorf("dial request for IP version %d: want 4 or 6", b[0])
	}
	if port = binary.BigEndian.Uint16(b[1:]); port == 0 {
		return "", 0, errors.New("dial request for port 0")
	}
	return network, port, nil
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
// which is syscall.ECONNREFUSED where nobody listens. Text of the guest's is
// quoted in ASCII.
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
		return fmt.Errorf("the guest says %+q", text)
	}
	return fmt.Errorf("answer %#x is unknown", b[0])
}
