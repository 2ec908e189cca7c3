package vsock

import (
	"fmt"
	"syscall"

	"github.com/vmrt/vmrt/pkg/vhostuser"
)

// maxBatch bounds the packets taken from the guest before others get the
// mutex.
const maxBatch = 128

// receive takes packets from the guest and reports whether there may be more.
func (d *Device) receive() (more bool) {
	d.stalled = false
	for n := 0; ; n++ {
		if n == maxBatch {
			more = true
			break
		}
		if d.replies.full() {
			// A guest that provokes resets has to take them.
			d.stalled = true
			break
		}
		ok, err := d.tx.Next(&d.txChain)
		if err != nil {
			d.backend.Fail(fmt.Errorf("vsock tx queue: %w", err))
			break
		}
		if !ok {
			if d.tx.WantKick() {
				continue
			}
			break
		}
		d.handle(&d.txChain.Readable)
		d.tx.Done(&d.txChain, 0)
	}
	d.tx.Flush()
	d.flush()
	if d.stalled && !d.replies.full() {
		more = true
	}
	return more
}

// handle takes one packet. Packets that no driver sends are dropped.
func (d *Device) handle(s *vhostuser.Segments) {
	var b [headerSize]byte
	if s.Read(b[:]) < headerSize {
		return
	}
	var h header
	h.decode(&b)
	if h.srcCID != uint64(d.cfg.GuestCID) {
		return
	}
	if h.dstCID != HostCID || h.typ != typeStream {
		d.reject(&h)
		return
	}
	c := d.conns[connID{local: h.dstPort, remote: h.srcPort}]
	if c == nil {
		if h.op != opRequest || !d.accept(&h) {
			d.reject(&h)
		}
		return
	}
	c.peerAlloc = h.bufAlloc
	// Packets of two threads of the guest can overtake each other between the
	// reading of the counter and the queue: an older count is no news, and to
	// believe it would take back credit that the guest thinks it has given.
	if int32(h.fwdCnt-c.peerFwd) > 0 {
		c.peerFwd = h.fwdCnt
	}
	switch c.state {
	case connecting:
		c.handleConnecting(&h)
	case open:
		c.handleOpen(&h, s)
	case closing:
		c.handleClosing(&h)
	}
	if c.state != detached && c.sendable() {
		d.senders.push(c)
	}
}

// reject answers a packet that belongs to no connection.
func (d *Device) reject(h *header) {
	if h.op != opReset {
		d.replies.push(reply{srcCID: h.dstCID, local: h.dstPort, remote: h.srcPort, typ: h.typ})
	}
}

func (c *Conn) handleConnecting(h *header) {
	switch {
	case c.pending&pendRequest != 0:
		// The guest cannot know of a connection that it was not asked for.
		c.d.reject(h)
	case h.op == opResponse:
		c.state = open
		c.wake()
	case h.op == opReset:
		c.detach(syscall.ECONNREFUSED)
	default:
		c.abort(syscall.ECONNRESET)
	}
}

func (c *Conn) handleOpen(h *header, s *vhostuser.Segments) {
	switch h.op {
	case opRW:
		c.receive(h, s)
	case opCreditUpdate:
	case opCreditRequest:
		c.pending |= pendCredit
	case opShutdown:
		c.peerShut |= h.flags & shutdownBoth
		if c.peerShut == shutdownBoth {
			// Everything has arrived: let the guest forget the connection.
			c.abort(nil)
			return
		}
		if c.peerShut&shutdownReceive != 0 {
			c.unsent = nil
		}
		c.wake()
	case opReset:
		c.detach(syscall.ECONNRESET)
	default:
		c.abort(syscall.ECONNRESET)
	}
}

// handleClosing waits for the guest to agree that the connection is over.
func (c *Conn) handleClosing(h *header) {
	switch h.op {
	case opReset:
		c.detach(nil)
	case opShutdown:
		if c.peerShut |= h.flags & shutdownBoth; c.peerShut == shutdownBoth {
			c.abort(nil)
		}
	}
}

// receive takes the payload of one packet: straight to a reader that waits,
// the rest to the buffer.
func (c *Conn) receive(h *header, s *vhostuser.Segments) {
	held := c.rxCount - c.fwdCount
	if h.len > c.alloc-held || int(h.len) > s.Len() || c.peerShut&shutdownSend != 0 {
		// The packet is shorter than it says, ignores the credit, or comes
		// after the announced end.
		c.abort(syscall.ECONNRESET)
		return
	}
	n := int(h.len)
	c.rxCount += h.len
	if c.shut&shutdownReceive != 0 {
		c.consumed(n)
		return
	}
	if len(c.reading) > 0 && n > 0 {
		k := s.Read(c.reading[:min(n, len(c.reading))])
		c.reading = c.reading[k:]
		c.read += k
		n -= k
		c.consumed(k)
		c.wake()
	}
	c.received.fill(&c.d.pool, s, n)
}
