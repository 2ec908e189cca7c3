package vsock

// Usage is what a device holds.
type Usage struct {
	Conns     int // not released
	Table     int // known to the guest
	Committed int // sum of the connections' limits
	Buffered  int // bytes received and not read
	Chunks    int // memory for them, in chunks
	Replies   int
	Senders   int
}

// Usage returns what the device holds, of which bytes only for connections
// that are in the table.
func (d *Device) Usage() Usage {
	d.mu.Lock()
	defer d.unlock()
	u := Usage{Conns: d.count, Table: len(d.conns), Committed: d.committed, Replies: d.replies.len()}
	for _, c := range d.conns {
		u.Buffered += c.received.len
		for k := c.received.head; k != nil; k = k.next {
			u.Chunks++
		}
	}
	for c := d.senders.first; c != nil; c = c.next {
		u.Senders++
	}
	return u
}

// Header is the device's own idea of a packet header.
type Header struct{ h header }

// DecodeHeader decodes a header.
func DecodeHeader(b [headerSize]byte) (h Header) {
	h.h.decode(&b)
	return h
}

// Encode encodes a header.
func (h Header) Encode() (b [headerSize]byte) {
	h.h.encode(&b)
	return b
}

// Op returns a field in the middle.
func (h Header) Op() uint16 { return h.h.op }

// Shift moves the connection's counters, as if n more bytes had gone both
// ways.
func (c *Conn) Shift(n uint32) {
	c.d.mu.Lock()
	defer c.d.unlock()
	for _, v := range []*uint32{&c.txCount, &c.peerFwd, &c.rxCount, &c.fwdCount, &c.advertised} {
		*v += n
	}
}
