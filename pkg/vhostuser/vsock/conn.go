package vsock

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// state is where a connection stands.
type state uint8

const (
	connecting state = iota // the guest has not answered yet
	open
	closing  // closed here, the guest was told and has not confirmed
	detached // not in the Device's table: packets no longer find it
)

// Packets that a connection has to send besides data.
const (
	pendRequest = 1 << iota
	pendResponse
	pendShutdown
	pendCredit
)

// Conn is a connection to the guest. It implements net.Conn; errors are
// *net.OpError. A connection that the guest breaks gives what has arrived
// before Read returns ECONNRESET.
type Conn struct {
	d             *Device
	id            connID
	local, remote Addr

	readMu, writeMu sync.Mutex // one reader and one writer at a time; taken before Device.mu

	// Everything below is guarded by Device.mu.
	readable, writable sync.Cond // the reader's, the writer's or dialler's
	woken              bool      // in Device.woken
	queued             bool      // in Device.senders
	next, prev         *Conn     // in Device.senders
	state              state
	pending            uint8
	closed             bool  // Close was called
	err                error // why detached, if not by agreement
	shut               uint32
	peerShut           uint32
	closeTimer         *time.Timer
	readLimit          deadline
	writeLimit         deadline

	// From the guest: it may be alloc bytes ahead of fwdCount, of which
	// advertised is what it was told.
	alloc                         uint32
	rxCount, fwdCount, advertised uint32
	received                      fifo
	reading                       []byte // free part of a waiting reader's buffer
	read                          int    // bytes put there

	// To the guest.
	peerAlloc, peerFwd, txCount uint32
	unsent                      []byte // what a waiting writer has left
	written                     int    // bytes of its buffer that were sent
}

var _ net.Conn = (*Conn)(nil)

// add makes a connection and enters it into the table.
func (d *Device) add(id connID, s state) (*Conn, error) {
	if d.count >= d.cfg.MaxConns {
		return nil, syscall.EMFILE
	}
	c := &Conn{
		d: d, id: id, state: s,
		local:  Addr{CID: HostCID, Port: id.local},
		remote: Addr{CID: d.cfg.GuestCID, Port: id.remote},
	}
	c.readable.L, c.writable.L = (*locker)(d), (*locker)(d)
	c.alloc = uint32(max(minBuffer, min(d.cfg.Buffer, (d.cfg.Memory-d.committed)/16)))
	d.count++
	d.committed += int(c.alloc)
	d.conns[id] = c
	return c, nil
}

// wake wakes whoever waits for c once the mutex is released.
func (c *Conn) wake() {
	if !c.woken {
		c.woken = true
		c.d.woken = append(c.d.woken, c)
	}
}

// abort resets the connection.
func (c *Conn) abort(err error) {
	if c.state != detached {
		c.d.replies.push(reply{srcCID: HostCID, local: c.id.local, remote: c.id.remote, typ: typeStream})
	}
	c.detach(err)
}

// detach takes c out of the table: the guest has forgotten it, or will. What
// was received remains readable.
func (c *Conn) detach(err error) {
	if c.state == detached {
		return
	}
	c.state = detached
	c.err = err
	c.pending, c.unsent = 0, nil
	delete(c.d.conns, c.id)
	c.d.senders.remove(c)
	if c.closeTimer != nil {
		c.closeTimer.Stop()
	}
	c.wake()
	if c.closed {
		c.release()
	}
}

// release returns what a connection that is closed and detached counted for.
func (c *Conn) release() {
	c.d.count--
	c.d.committed -= int(c.alloc)
}

// Close ends the connection in both directions. What was written is still
// delivered; what was received is dropped. Idempotent.
func (c *Conn) Close() error {
	c.d.mu.Lock()
	defer c.d.unlock()
	c.close()
	return nil
}

func (c *Conn) close() {
	if c.closed {
		return
	}
	c.closed = true
	c.readLimit.stop()
	c.writeLimit.stop()
	c.unsent, c.reading = nil, nil
	c.received.clear(&c.d.pool)
	c.wake()
	switch c.state {
	case detached:
		c.release()
	case connecting:
		if c.pending&pendRequest != 0 {
			c.detach(net.ErrClosed)
		} else {
			c.abort(net.ErrClosed)
		}
		c.d.flush()
	case open:
		c.state = closing
		c.closeTimer = time.AfterFunc(c.d.cfg.CloseTimeout, c.expire)
		c.shutdown(shutdownBoth)
	}
}

// expire gives up waiting for the guest to confirm an end.
func (c *Conn) expire() {
	c.d.mu.Lock()
	defer c.d.unlock()
	c.abort(nil)
	c.d.flush()
}

// CloseWrite ends the stream to the guest, which reads to its end. Reading
// goes on.
func (c *Conn) CloseWrite() error { return c.closeHalf(shutdownSend) }

// CloseRead drops what was received and what still comes. Writing goes on.
func (c *Conn) CloseRead() error { return c.closeHalf(shutdownReceive) }

func (c *Conn) closeHalf(how uint32) error {
	c.d.mu.Lock()
	defer c.d.unlock()
	if c.closed {
		return c.opError("close", net.ErrClosed)
	}
	if how&shutdownReceive != 0 {
		held := c.received.len
		c.received.clear(&c.d.pool)
		c.reading = nil
		c.consumed(held)
	}
	if how&shutdownSend != 0 {
		c.unsent = nil
	}
	c.wake()
	c.shutdown(how)
	return nil
}

// shutdown tells the guest what this side will no longer do.
func (c *Conn) shutdown(how uint32) {
	if c.shut|how == c.shut {
		return
	}
	c.shut |= how
	if c.state != detached {
		c.pending |= pendShutdown
		c.d.senders.push(c)
		c.d.flush()
	}
}

// PeerClosed reports whether the guest has ended its stream and takes no more
// of ours: what a close of the whole connection is there, or a reset.
func (c *Conn) PeerClosed() bool {
	c.d.mu.Lock()
	defer c.d.unlock()
	return c.peerShut == shutdownBoth || c.err != nil
}

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	c.d.mu.Lock()
	defer c.d.unlock()
	n, err := 0, c.readError(len(p))
	if err == nil && len(p) > 0 && c.received.len == 0 {
		n, err = c.wait(p)
	}
	if n == 0 && err == nil {
		n = c.received.read(&c.d.pool, p)
		c.consumed(n)
		c.d.flush()
	}
	switch {
	case n > 0:
		return n, nil
	case err == io.EOF:
		return 0, io.EOF
	case err != nil:
		return 0, c.opError("read", err)
	}
	return 0, nil
}

// wait lends p to the packets that arrive until there is something in it, or
// in the buffer, or an error.
func (c *Conn) wait(p []byte) (n int, err error) {
	c.reading, c.read = p, 0
	for c.read == 0 && c.received.len == 0 {
		if err = c.readError(len(p)); err != nil {
			break
		}
		c.readable.Wait()
	}
	n, c.reading, c.read = c.read, nil, 0
	return n, err
}

// readError says why nothing can be read, if so. want is 0 for a Read that
// only asks whether it may.
func (c *Conn) readError(want int) error {
	switch {
	case c.closed:
		return net.ErrClosed
	case c.readLimit.expired:
		return os.ErrDeadlineExceeded
	case want == 0 || c.received.len > 0:
		return nil
	case c.shut&shutdownReceive != 0, c.peerShut&shutdownSend != 0:
		return io.EOF
	}
	return c.err
}

// Write implements net.Conn. It returns when everything is in the guest's
// memory, which says nothing of the guest having read it.
func (c *Conn) Write(p []byte) (int, error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	c.d.mu.Lock()
	defer c.d.unlock()
	c.written = 0
	err := c.writeError()
	if err == nil {
		err = c.push(p)
	}
	if err != nil {
		return c.written, c.opError("write", err)
	}
	return len(p), nil
}

// push has p sent and waits until that is done or cannot be.
func (c *Conn) push(p []byte) error {
	c.unsent = p
	if len(p) > 0 {
		c.d.senders.push(c)
		c.d.flush()
	}
	for c.written < len(p) {
		if err := c.writeError(); err != nil {
			c.unsent = nil
			return err
		}
		c.writable.Wait()
	}
	return nil
}

// writeError says why nothing can be written, if so.
func (c *Conn) writeError() error {
	switch {
	case c.closed:
		return net.ErrClosed
	case c.writeLimit.expired:
		return os.ErrDeadlineExceeded
	case c.err != nil:
		return c.err
	case c.shut&shutdownSend != 0, c.peerShut&shutdownReceive != 0:
		return syscall.EPIPE
	}
	return nil
}
