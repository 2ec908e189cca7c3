package vsock

import (
	"context"
	"net"
	"sync"
	"syscall"
)

// Listener takes the guest's connections to one port of the host.
type Listener struct {
	d    *Device
	addr Addr

	// Guarded by Device.mu.
	acceptable sync.Cond
	backlog    []*Conn
	err        error // set when closed
}

var _ net.Listener = (*Listener)(nil)

// Listen takes connections to a port of the host, which is any number but
// 2^32-1.
func (d *Device) Listen(port uint32) (*Listener, error) {
	l := &Listener{d: d, addr: Addr{CID: HostCID, Port: port}}
	l.acceptable.L = (*locker)(d)
	d.mu.Lock()
	defer d.unlock()
	switch {
	case d.err != nil:
		return nil, l.opError("listen", d.err)
	case port == anyPort:
		return nil, l.opError("listen", syscall.EINVAL)
	case d.listeners[port] != nil:
		return nil, l.opError("listen", syscall.EADDRINUSE)
	}
	d.listeners[port] = l
	return l, nil
}

func (l *Listener) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "vsock", Addr: l.addr, Err: err}
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	c, err := l.AcceptContext(context.Background())
	if err != nil {
		return nil, err
	}
	return c, nil
}

// AcceptContext is Accept that also ends with ctx.
func (l *Listener) AcceptContext(ctx context.Context) (*Conn, error) {
	stop := context.AfterFunc(ctx, func() {
		l.d.mu.Lock()
		defer l.d.unlock()
		l.acceptable.Broadcast()
	})
	defer stop()
	l.d.mu.Lock()
	defer l.d.unlock()
	for len(l.backlog) == 0 {
		if l.err != nil {
			return nil, l.opError("accept", l.err)
		}
		if err := ctx.Err(); err != nil {
			return nil, l.opError("accept", err)
		}
		l.acceptable.Wait()
	}
	c := l.backlog[0]
	l.backlog[0] = nil
	l.backlog = l.backlog[1:]
	return c, nil
}

// Addr implements net.Listener.
func (l *Listener) Addr() net.Addr { return l.addr }

// Close ends the listener and the connections that it has not handed out.
// Idempotent.
func (l *Listener) Close() error {
	l.d.mu.Lock()
	defer l.d.unlock()
	l.end(net.ErrClosed)
	return nil
}

func (l *Listener) end(err error) {
	if l.err != nil {
		return
	}
	l.err = err
	delete(l.d.listeners, l.addr.Port)
	for _, c := range l.backlog {
		c.close()
	}
	l.backlog = nil
	l.acceptable.Broadcast()
}

// accept makes a connection of a request and reports whether it could.
func (d *Device) accept(h *header) bool {
	l := d.listeners[h.dstPort]
	if l == nil || len(l.backlog) >= d.cfg.Backlog {
		return false
	}
	c, err := d.add(connID{local: h.dstPort, remote: h.srcPort}, open)
	if err != nil {
		return false
	}
	c.peerAlloc, c.peerFwd = h.bufAlloc, h.fwdCnt
	c.pending = pendResponse
	d.senders.push(c)
	l.backlog = append(l.backlog, c)
	l.acceptable.Signal()
	return true
}
