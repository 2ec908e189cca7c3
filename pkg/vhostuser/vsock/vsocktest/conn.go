package vsocktest

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/vmrt/vmrt/pkg/vhostuser/vsock"
)

// Conn is the guest's end of a connection.
type Conn struct {
	g               *Guest
	id              connID
	readMu, writeMu sync.Mutex

	// Guarded by Guest.mu.
	changed           sync.Cond
	connected         bool
	closed            bool
	detached, muted   bool
	err               error
	shut, peerShut    uint32
	buf               bytes.Buffer
	rx, fwd, told     uint32
	tx                uint32
	peerAlloc, peer   uint32
	readEnd, writeEnd limit
}

// limit is a deadline.
type limit struct {
	timer   *time.Timer
	expired bool
}

var _ net.Conn = (*Conn)(nil)

// add makes a connection, with the mutex held.
func (g *Guest) add(id connID) *Conn {
	c := &Conn{g: g, id: id}
	c.changed.L = &g.mu
	g.conns[id] = c
	return c
}

// Dial connects to a port of the host.
func (g *Guest) Dial(ctx context.Context, port uint32) (*Conn, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.nextPort++
	c := g.add(connID{local: g.nextPort, remote: port})
	if err := c.send(OpRequest, 0, nil); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		c.changed.Broadcast()
	})
	defer stop()
	for !c.connected && !c.detached {
		if err := ctx.Err(); err != nil {
			c.detach(err)
			_ = c.send(OpReset, 0, nil)
			return nil, err
		}
		c.changed.Wait()
	}
	if c.err != nil {
		return nil, c.err
	}
	return c, nil
}

// send sends a packet of the connection.
func (c *Conn) send(op uint16, flags uint32, payload []byte) error {
	h := c.g.Header(c.id.local, c.id.remote, op)
	h.Flags, h.FwdCnt = flags, c.fwd
	c.told = c.fwd
	return c.g.transmit(h, payload)
}

func (c *Conn) detach(err error) {
	if !c.detached {
		c.detached, c.err = true, err
		delete(c.g.conns, c.id)
		c.changed.Broadcast()
	}
}

// handle takes a packet of the connection.
func (c *Conn) handle(h *Header, payload []byte) {
	if c.muted {
		return
	}
	c.peerAlloc, c.peer = h.BufAlloc, h.FwdCnt
	defer c.changed.Broadcast()
	switch h.Op {
	case OpResponse:
		c.connected = true
	case OpReset:
		err := error(syscall.ECONNRESET)
		if c.closed || c.peerShut == shutBoth {
			err = nil
		}
		c.detach(err)
	case OpRW:
		if c.rx-c.fwd+h.Len > c.g.cfg.Credit {
			panic("vsocktest: the host ignores the credit")
		}
		c.rx += h.Len
		if c.closed || c.shut&shutReceive != 0 {
			c.fwd += h.Len
			return
		}
		c.buf.Write(payload)
	case OpCreditRequest:
		_ = c.send(OpCreditUpdate, 0, nil)
	case OpShutdown:
		c.peerShut |= h.Flags
		if c.peerShut == shutBoth && (c.buf.Len() == 0 || c.closed) {
			_ = c.send(OpReset, 0, nil)
			c.detach(nil)
		}
	}
}

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	c.g.mu.Lock()
	defer c.g.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, c.opError("read", net.ErrClosed)
		case c.readEnd.expired:
			return 0, c.opError("read", os.ErrDeadlineExceeded)
		case len(p) == 0:
			return 0, nil
		case c.buf.Len() > 0:
			return c.take(p), nil
		case c.peerShut&shutSend != 0, c.shut&shutReceive != 0:
			return 0, io.EOF
		case c.err != nil:
			return 0, c.opError("read", c.err)
		}
		c.changed.Wait()
	}
}

// take moves bytes from the buffer, and tells the host as Linux does: when
// less than one packet of the largest size is left of what it knows.
func (c *Conn) take(p []byte) int {
	n, _ := c.buf.Read(p)
	c.fwd += uint32(n)
	if free := c.g.cfg.Credit - (c.rx - c.told); free < maxPayload && !c.detached {
		_ = c.send(OpCreditUpdate, 0, nil)
	}
	return n
}

// Write implements net.Conn.
func (c *Conn) Write(p []byte) (int, error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	c.g.mu.Lock()
	defer c.g.mu.Unlock()
	for done := 0; ; {
		switch {
		case c.closed:
			return done, c.opError("write", net.ErrClosed)
		case c.writeEnd.expired:
			return done, c.opError("write", os.ErrDeadlineExceeded)
		case c.err != nil:
			return done, c.opError("write", c.err)
		case c.peerShut&shutReceive != 0, c.shut&shutSend != 0:
			return done, c.opError("write", syscall.EPIPE)
		case done == len(p):
			return done, nil
		}
		credit := min(int64(c.peerAlloc), int64(c.g.cfg.Window)) - int64(c.tx-c.peer)
		if n := int(min(int64(len(p)-done), credit, maxPayload)); n > 0 {
			c.tx += uint32(n)
			if err := c.send(OpRW, 0, p[done:done+n]); err != nil {
				return done, c.opError("write", err)
			}
			done += n
			continue
		}
		c.changed.Wait()
	}
}

// CloseWrite ends the stream to the host.
func (c *Conn) CloseWrite() error { return c.shutdown(shutSend) }

// CloseRead ends the stream from the host.
func (c *Conn) CloseRead() error { return c.shutdown(shutReceive) }

func (c *Conn) shutdown(how uint32) error {
	c.g.mu.Lock()
	defer c.g.mu.Unlock()
	c.shut |= how
	c.changed.Broadcast()
	if c.detached {
		return nil
	}
	return c.send(OpShutdown, c.shut, nil)
}

// Close ends the connection. Like Linux it waits for nothing: the host
// confirms with a reset.
func (c *Conn) Close() error {
	c.g.mu.Lock()
	defer c.g.mu.Unlock()
	if c.closed {
		return nil
	}
	c.closed = true
	c.changed.Broadcast()
	switch {
	case c.detached:
		return nil
	case c.peerShut == shutBoth:
		c.detach(nil)
		return c.send(OpReset, 0, nil)
	}
	return c.send(OpShutdown, shutBoth, nil)
}

// Credit returns how many bytes the host lets the guest send ahead of it.
func (c *Conn) Credit() uint32 {
	c.g.mu.Lock()
	defer c.g.mu.Unlock()
	return c.peerAlloc
}

// Mute forgets the connection without a word to the host, and answers nothing
// that still comes for it.
func (c *Conn) Mute() {
	c.g.mu.Lock()
	defer c.g.mu.Unlock()
	c.muted = true
	c.changed.Broadcast()
}

// Shift moves the connection's counters, as if n more bytes had gone both
// ways.
func (c *Conn) Shift(n uint32) {
	c.g.mu.Lock()
	defer c.g.mu.Unlock()
	for _, v := range []*uint32{&c.tx, &c.peer, &c.rx, &c.fwd, &c.told} {
		*v += n
	}
}

// Reset breaks the connection.
func (c *Conn) Reset() error {
	c.g.mu.Lock()
	defer c.g.mu.Unlock()
	c.detach(syscall.ECONNRESET)
	return c.send(OpReset, 0, nil)
}

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr {
	return vsock.Addr{CID: uint32(c.g.cid), Port: c.id.local}
}

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return vsock.Addr{CID: hostCID, Port: c.id.remote} }

func (c *Conn) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "vsock", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error {
	c.setLimit(&c.readEnd, t)
	c.setLimit(&c.writeEnd, t)
	return nil
}

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.setLimit(&c.readEnd, t)
	return nil
}

// SetWriteDeadline implements net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.setLimit(&c.writeEnd, t)
	return nil
}

func (c *Conn) setLimit(l *limit, t time.Time) {
	c.g.mu.Lock()
	defer c.g.mu.Unlock()
	if l.timer != nil {
		l.timer.Stop()
		l.timer = nil
	}
	l.expired = false
	if t.IsZero() {
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(max(time.Until(t), 0), func() {
		c.g.mu.Lock()
		defer c.g.mu.Unlock()
		if l.timer == timer {
			l.expired = true
			c.changed.Broadcast()
		}
	})
	l.timer = timer
}

// Listener takes the host's connections to one port of the guest.
type Listener struct {
	g    *Guest
	port uint32

	// Guarded by Guest.mu.
	ready   sync.Cond
	backlog []*Conn
	closed  bool
}

var _ net.Listener = (*Listener)(nil)

// Listen takes connections to a port of the guest.
func (g *Guest) Listen(port uint32) *Listener {
	g.mu.Lock()
	defer g.mu.Unlock()
	l := &Listener{g: g, port: port}
	l.ready.L = &g.mu
	g.listeners[port] = l
	return l
}

// add answers a request.
func (l *Listener) add(h *Header) {
	c := l.g.add(connID{local: h.DstPort, remote: h.SrcPort})
	c.connected = true
	c.peerAlloc, c.peer = h.BufAlloc, h.FwdCnt
	_ = c.send(OpResponse, 0, nil)
	l.backlog = append(l.backlog, c)
	l.ready.Signal()
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	l.g.mu.Lock()
	defer l.g.mu.Unlock()
	for len(l.backlog) == 0 {
		if l.closed {
			return nil, net.ErrClosed
		}
		l.ready.Wait()
	}
	c := l.backlog[0]
	l.backlog = l.backlog[1:]
	return c, nil
}

// Addr implements net.Listener.
func (l *Listener) Addr() net.Addr { return vsock.Addr{CID: uint32(l.g.cid), Port: l.port} }

// Close implements net.Listener.
func (l *Listener) Close() error {
	l.g.mu.Lock()
	defer l.g.mu.Unlock()
	l.end()
	return nil
}

func (l *Listener) end() {
	l.closed = true
	delete(l.g.listeners, l.port)
	l.ready.Broadcast()
}
