package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// socket frames messages on a stream. One goroutine uses it.
type socket struct {
	conn *net.UnixConn
	oob  []byte
}

func newSocket(conn *net.UnixConn) *socket {
	return &socket{conn: conn, oob: make([]byte, unix.CmsgSpace(4*maxRegions))}
}

// receive returns the next message, whose descriptors the caller owns. It returns
// io.EOF when the front end hung up between messages.
func (s *socket) receive() (*message, error) {
	var header [headerSize]byte
	// Descriptors come with the first byte of a message: the front end sends
	// each with one sendmsg.
	n, oobn, flags, _, err := s.conn.ReadMsgUnix(header[:], s.oob)
	if err != nil {
		return nil, err
	}
	fds, err := parseRights(s.oob[:oobn])
	m := &message{fds: fds}
	switch {
	case err != nil:
	case flags&unix.MSG_CTRUNC != 0:
		err = fmt.Errorf("more than %d descriptors", maxRegions)
	case n == 0:
		err = io.EOF
	default:
		err = s.fill(m, header[:], n)
	}
	if err != nil {
		m.closeFDs()
		return nil, err
	}
	return m, nil
}

// fill reads what is missing of a message of whose header n bytes are there.
func (s *socket) fill(m *message, header []byte, n int) error {
	if _, err := io.ReadFull(s.conn, header[n:]); err != nil {
		return unexpectedEOF(err)
	}
	m.req = request(binary.LittleEndian.Uint32(header))
	m.flags = binary.LittleEndian.Uint32(header[4:])
	size := binary.LittleEndian.Uint32(header[8:])
	if m.flags&flagVersionMask != flagVersion || m.flags&flagReply != 0 {
		return fmt.Errorf("%v: flags %#x", m.req, m.flags)
	}
	if size > maxPayload {
		return fmt.Errorf("%v: payload of %d bytes: at most %d", m.req, size, maxPayload)
	}
	m.payload = make([]byte, size)
	if _, err := io.ReadFull(s.conn, m.payload); err != nil {
		return unexpectedEOF(err)
	}
	return nil
}

// unexpectedEOF is err for a message that broke off.
func unexpectedEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// parseRights returns the descriptors of control messages. On an error, those
// that were found are returned as well.
func parseRights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("control message: %w", err)
	}
	var fds []int
	for i := range msgs {
		rights, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			return fds, fmt.Errorf("control message: %w", err)
		}
		fds = append(fds, rights...)
	}
	return fds, nil
}

// reply answers a request.
func (s *socket) reply(req request, payload []byte) error {
	b := make([]byte, headerSize, headerSize+len(payload))
	binary.LittleEndian.PutUint32(b, uint32(req))
	binary.LittleEndian.PutUint32(b[4:], flagVersion|flagReply)
	binary.LittleEndian.PutUint32(b[8:], uint32(len(payload)))
	_, err := s.conn.Write(append(b, payload...))
	return err
}
