// Package exchange is the protocol between the tests of package vsock and the
// program that they run in the guest: requests on a stream, each a command, a
// number of bytes and, for some, those bytes.
package exchange

import (
	"encoding/binary"
	"fmt"
	"io"
)

// Ports of the guest.
const (
	// Port serves requests.
	Port = 2000
	// PortClose accepts connections and closes them at once.
	PortClose = 2001
	// PortUpper reads a stream to its end and answers in capitals.
	PortUpper = 2002
	// PortSmall sends a byte and then serves requests with a small buffer.
	PortSmall = 2003
	// PortHold serves requests once there is a connection to PortRelease.
	PortHold    = 2004
	PortRelease = 2005
)

// PortArg is the kernel argument that names the host's port.
const PortArg = "vsocktest.port="

// Commands.
const (
	Echo = 'e' // n bytes follow and come back
	Sink = 's' // n bytes follow, one comes back
	Give = 'g' // n bytes come back
)

// Request starts a request.
func Request(w io.Writer, command byte, n uint64) error {
	_, err := w.Write(binary.LittleEndian.AppendUint64([]byte{command}, n))
	return err
}

// Serve answers requests until the stream ends. buf bounds the pieces in
// which it reads and writes.
func Serve(rw io.ReadWriter, buf []byte) error {
	for {
		var h [9]byte
		if _, err := io.ReadFull(rw, h[:]); err != nil {
			if err == io.EOF {
				return nil
			}
			return err
		}
		n := binary.LittleEndian.Uint64(h[1:])
		var err error
		switch h[0] {
		case Echo:
			_, err = io.CopyBuffer(onlyWriter{rw}, onlyReader{io.LimitReader(rw, int64(n))}, buf)
		case Sink:
			if _, err = io.CopyBuffer(onlyWriter{io.Discard}, onlyReader{io.LimitReader(rw, int64(n))}, buf); err == nil {
				_, err = rw.Write([]byte{1})
			}
		case Give:
			_, err = io.CopyBuffer(onlyWriter{rw}, onlyReader{io.LimitReader(zero{}, int64(n))}, buf)
		default:
			err = fmt.Errorf("command %q", h[0])
		}
		if err != nil {
			return err
		}
	}
}

// onlyReader and onlyWriter make io.CopyBuffer use its buffer.
type onlyReader struct{ io.Reader }
type onlyWriter struct{ io.Writer }

// zero reads as zeroes, without the time to write them.
type zero struct{}

func (zero) Read(p []byte) (int, error) { return len(p), nil }
