package vsock

import (
	"fmt"

	"github.com/vmrt/vmrt/pkg/vhostuser"
)

// senders is a queue of connections that have something for the guest.
type senders struct{ first, last *Conn }

// push appends c unless it is in the queue.
func (s *senders) push(c *Conn) {
	if c.queued {
		return
	}
	c.queued = true
	c.prev, c.next = s.last, nil
	if s.last != nil {
		s.last.next = c
	} else {
		s.first = c
	}
	s.last = c
}

// remove takes c out if it is in the queue.
func (s *senders) remove(c *Conn) {
	if !c.queued {
		return
	}
	if c.prev != nil {
		c.prev.next = c.next
	} else {
		s.first = c.next
	}
	if c.next != nil {
		c.next.prev = c.prev
	} else {
		s.last = c.prev
	}
	c.queued, c.prev, c.next = false, nil, nil
}

// reply is a reset for a packet that belongs to no connection, or to one that
// is no more.
type reply struct {
	srcCID        uint64
	local, remote uint32
	typ           uint16
}

// maxReplies bounds the replies that a guest can cause before it takes some.
const maxReplies = 256

// replies is a queue of resets. Those that the guest provokes wait for room
// (full); a connection that ends adds one at any time, of which there are at
// most as many as connections.
type replies struct {
	queue []reply
	first int
}

func (r *replies) len() int   { return len(r.queue) - r.first }
func (r *replies) full() bool { return r.len() >= maxReplies }
func (r *replies) clear()     { r.queue, r.first = nil, 0 }

func (r *replies) push(p reply) {
	if r.first > 0 && len(r.queue) == cap(r.queue) {
		n := copy(r.queue, r.queue[r.first:])
		r.queue, r.first = r.queue[:n], 0
	}
	r.queue = append(r.queue, p)
}

func (r *replies) pop() reply {
	p := r.queue[r.first]
	r.first++
	return p
}

// flush sends what there is to send, as far as the guest has room for it.
func (d *Device) flush() {
	for {
		c := d.nextSender()
		if c == nil && d.replies.len() == 0 {
			break
		}
		ok, err := d.rx.Next(&d.rxChain)
		if err != nil {
			d.backend.Fail(fmt.Errorf("vsock rx queue: %w", err))
			break
		}
		if !ok {
			if d.rx.WantKick() {
				continue
			}
			break
		}
		w := &d.rxChain.Writable
		if w.Len() <= headerSize {
			d.backend.Fail(fmt.Errorf("vsock rx queue: buffer of %d bytes", w.Len()))
			break
		}
		var n int
		if d.replies.len() > 0 {
			n = d.sendReset(w, d.replies.pop())
		} else {
			n = c.send(w)
			// To the end of the queue, or out of it.
			d.senders.remove(c)
			if c.sendable() {
				d.senders.push(c)
			}
		}
		d.rx.Done(&d.rxChain, uint32(n))
	}
	d.rx.Flush()
}

// nextSender returns the first connection that has something to send now.
func (d *Device) nextSender() *Conn {
	for d.senders.first != nil {
		if c := d.senders.first; c.sendable() {
			return c
		}
		d.senders.remove(d.senders.first)
	}
	return nil
}

// sendReset writes one reset and returns its length.
func (d *Device) sendReset(w *vhostuser.Segments, r reply) int {
	h := header{
		srcCID: r.srcCID, dstCID: uint64(d.cfg.GuestCID),
		srcPort: r.local, dstPort: r.remote,
		typ: r.typ, op: opReset,
	}
	var b [headerSize]byte
	h.encode(&b)
	return w.Write(b[:])
}

// sendable reports whether c has a packet that the guest has credit for.
func (c *Conn) sendable() bool {
	return c.pending != 0 || len(c.unsent) > 0 && c.credit() > 0
}

// send writes one packet of a connection that is sendable, and returns its
// length.
func (c *Conn) send(w *vhostuser.Segments) int {
	h := header{
		srcCID: HostCID, dstCID: uint64(c.d.cfg.GuestCID),
		srcPort: c.id.local, dstPort: c.id.remote,
		typ:      typeStream,
		bufAlloc: c.alloc, fwdCnt: c.fwdCount,
	}
	var payload []byte
	switch {
	case c.pending&pendRequest != 0:
		h.op = opRequest
		c.pending &^= pendRequest
	case c.pending&pendResponse != 0:
		h.op = opResponse
		c.pending &^= pendResponse
	case len(c.unsent) > 0 && c.credit() > 0:
		h.op = opRW
		n := min(len(c.unsent), int(c.credit()), w.Len()-headerSize)
		payload, c.unsent = c.unsent[:n], c.unsent[n:]
		h.len = uint32(n)
		c.txCount += uint32(n)
		c.written += n
		if len(c.unsent) == 0 {
			c.wake()
		}
	case c.pending&pendShutdown != 0:
		h.op = opShutdown
		h.flags = c.shut
		c.pending &^= pendShutdown
	default:
		h.op = opCreditUpdate
	}
	// Every packet carries the credit.
	c.pending &^= pendCredit
	c.advertised = c.fwdCount
	var b [headerSize]byte
	h.encode(&b)
	return w.Write(b[:]) + w.Write(payload)
}
