package vsock

import (
	"fmt"
	"net"
)

// Addr is one end of a connection.
type Addr struct{ CID, Port uint32 }

var _ net.Addr = Addr{}

// Network returns "vsock".
func (Addr) Network() string { return "vsock" }

func (a Addr) String() string {
	if a.CID == HostCID {
		return fmt.Sprintf("host:%d", a.Port)
	}
	return fmt.Sprintf("vm(%d):%d", a.CID, a.Port)
}

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// opError says which operation failed between which ends.
func (c *Conn) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "vsock", Source: c.local, Addr: c.remote, Err: err}
}
