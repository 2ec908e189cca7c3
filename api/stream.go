package api

import (
	"encoding/binary"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"
)

// A stream connection starts with a header that names it. The host has dialled
// it to PortStream before it names the stream in a request: a Create or Exec
// whose stdin, stdout or stderr is StreamURL(name) takes that connection.
//
// Bytes follow as they are. For stdin the host half-closes after the last
// byte; for stdout and stderr the agent does. Closing a connection whole
// abandons the stream.

// StreamScheme marks a stdio field as the name of a stream connection.
const StreamScheme = "vmrt-stream"

// MaxStreamName bounds a stream's name, in bytes.
const MaxStreamName = 128

// StreamAck is the byte that the agent answers a header with once the stream
// can be named in a request.
const StreamAck = 'k'

// StreamURL returns the stdio field for the stream connection called name.
func StreamURL(name string) string { return StreamScheme + "://" + name }

// WriteStreamHeader names the stream connection w and must come first on it.
// Format: one byte length, then the name.
func WriteStreamHeader(w io.Writer, name string) error {
	if err := checkStreamName(name); err != nil {
		return err
	}
	_, err := w.Write(append([]byte{byte(len(name))}, name...))
	return err
}

// ReadStreamHeader reads what WriteStreamHeader wrote.
func ReadStreamHeader(r io.Reader) (string, error) {
	var n [1]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return "", fmt.Errorf("read stream header: %w", err)
	}
	b := make([]byte, n[0])
	if _, err := io.ReadFull(r, b); err != nil {
		return "", fmt.Errorf("read stream header: %w", err)
	}
	return string(b), checkStreamName(string(b))
}

func checkStreamName(name string) error {
	if len(name) == 0 || len(name) > MaxStreamName {
		return fmt.Errorf("stream name of %d bytes: want 1 to %d", len(name), MaxStreamName)
	}
	for _, c := range []byte(name) {
		if c <= ' ' || c >= 0x7f || c == '/' {
			return fmt.Errorf("stream name %q: want printable ASCII without '/'", name)
		}
	}
	return nil
}

// WriteMessage sends m as a big-endian uint32 length and its encoding.
func WriteMessage(w io.Writer, m proto.Message) error {
	b, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	if len(b) > MaxHello {
		return fmt.Errorf("message of %d bytes: at most %d", len(b), MaxHello)
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...))
	return err
}

// ReadMessage reads what WriteMessage sent. A length above MaxHello is an
// error before anything is allocated for it.
func ReadMessage(r io.Reader, m proto.Message) error {
	b, err := ReadFrame(r)
	if err != nil {
		return err
	}
	if err := proto.Unmarshal(b, m); err != nil {
		return fmt.Errorf("decode message of %d bytes: %w", len(b), err)
	}
	return nil
}

// ReadFrame reads one message as it was encoded.
func ReadFrame(r io.Reader) ([]byte, error) {
	var h [4]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return nil, fmt.Errorf("read message length: %w", err)
	}
	n := binary.BigEndian.Uint32(h[:])
	if n > MaxHello {
		return nil, fmt.Errorf("message of %d bytes: at most %d", n, MaxHello)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, fmt.Errorf("read message of %d bytes: %w", n, err)
	}
	return b, nil
}
