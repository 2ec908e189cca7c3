package vsock

import (
	"context"
	"errors"
	"net"
	"syscall"
)

// firstEphemeral is the first port that Dial calls from.
const firstEphemeral = 49152

// anyPort is VMADDR_PORT_ANY, which is no port.
const anyPort = 1<<32 - 1

// Dial connects to a port of the guest. It waits for the guest's driver to be
// ready and to answer until ctx ends; a port on which nobody listens is
// ECONNREFUSED. Errors are *net.OpError.
func (d *Device) Dial(ctx context.Context, port uint32) (*Conn, error) {
	c, err := d.dial(ctx, port)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "vsock", Addr: Addr{CID: d.cfg.GuestCID, Port: port}, Err: err}
	}
	return c, nil
}

func (d *Device) dial(ctx context.Context, port uint32) (*Conn, error) {
	d.mu.Lock()
	defer d.unlock()
	if d.err != nil {
		return nil, d.err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	local, err := d.ephemeralPort(port)
	if err != nil {
		return nil, err
	}
	c, err := d.add(connID{local: local, remote: port}, connecting)
	if err != nil {
		return nil, err
	}
	c.pending = pendRequest
	d.senders.push(c)
	d.flush()

	stop := context.AfterFunc(ctx, func() {
		d.mu.Lock()
		defer d.unlock()
		c.wake()
	})
	defer stop()
	for c.state == connecting && ctx.Err() == nil {
		c.writable.Wait()
	}
	switch {
	case c.state == open:
		return c, nil
	case c.state == connecting:
		err = ctx.Err()
	case d.err != nil:
		err = d.err
	case c.err != nil:
		err = c.err
	default:
		// The guest has accepted and closed at once.
		return c, nil
	}
	c.close()
	return nil, err
}

// ephemeralPort returns a local port from which there is no connection to a
// remote port. Ports are used in turn: a connection that the guest has not
// forgotten yet is not met soon.
func (d *Device) ephemeralPort(remote uint32) (uint32, error) {
	for range d.cfg.MaxConns + len(d.listeners) + 1 {
		port := d.nextPort
		if d.nextPort++; d.nextPort == anyPort {
			d.nextPort = firstEphemeral
		}
		if d.conns[connID{local: port, remote: remote}] == nil && d.listeners[port] == nil {
			return port, nil
		}
	}
	return 0, errors.Join(errors.New("no local port"), syscall.EADDRNOTAVAIL)
}
