package qmp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
)

// FD is where QEMU keeps a descriptor that AddFD gave it.
type FD struct {
	// Set can be opened by QEMU under the path /dev/fdset/<Set>.
	Set int `json:"fdset-id"`
	// Number is the descriptor's number in QEMU.
	Number int `json:"fd"`
}

// Path returns the path that makes QEMU use the descriptor where it takes a
// file's path.
func (fd FD) Path() string { return fmt.Sprintf("/dev/fdset/%d", fd.Set) }

// AddFD gives QEMU a duplicate of f in a new descriptor set (add-fd). f stays
// the caller's.
func (c *Client) AddFD(ctx context.Context, f *os.File) (FD, error) {
	var fd FD
	err := c.withFile(f, func(rights []byte) error {
		return c.execute(ctx, "add-fd", nil, &fd, rights)
	})
	return fd, err
}

// GetFD gives QEMU a duplicate of f under a name (getfd), for commands that
// take a named descriptor. The name is free again once a command has used it. f
// stays the caller's.
func (c *Client) GetFD(ctx context.Context, name string, f *os.File) error {
	return c.withFile(f, func(rights []byte) error {
		return c.execute(ctx, "getfd", map[string]string{"fdname": name}, nil, rights)
	})
}

// withFile keeps f open while its descriptor is sent.
func (c *Client) withFile(f *os.File, send func(rights []byte) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	if err := raw.Control(func(fd uintptr) {
		sent = send(syscall.UnixRights(int(fd)))
	}); err != nil {
		return fmt.Errorf("pass %s: %w", f.Name(), os.ErrClosed)
	}
	return sent
}

// send writes line, with the descriptors of rights on its first byte.
func (c *Client) send(line, rights []byte) (int, error) {
	if rights == nil {
		return c.conn.Write(line)
	}
	conn, ok := c.conn.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("pass a descriptor on a %T: %w", c.conn, errors.ErrUnsupported)
	}
	n, _, err := conn.WriteMsgUnix(line, rights, nil)
	if err != nil || n == len(line) {
		return n, err
	}
	more, err := conn.Write(line[n:])
	return n + more, err
}
