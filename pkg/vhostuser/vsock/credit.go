package vsock

import "time"

// creditDelay is how long a guest may wait for credit that it could have, if
// it does not tell how far ahead it goes.
const creditDelay = 100 * time.Millisecond

// credit returns how many bytes the guest is ready to take (virtio 1.2,
// section 5.10.6.3). The counters wrap.
func (c *Conn) credit() uint32 {
	if inFlight := c.txCount - c.peerFwd; inFlight < c.peerAlloc {
		return c.peerAlloc - inFlight
	}
	return 0
}

// consumed counts bytes that have left the buffer, and has the guest told:
// at once when it may soon have to wait and there is enough news to be worth a
// packet, else with the next packet or after creditDelay.
//
// A guest need not use all of the credit that it has. Linux goes no further
// ahead than its own buffer is large (net/vmw_vsock/virtio_transport_common.c,
// virtio_transport_tx_buf_size), which it advertises. The delay is for guests
// with other reasons.
func (c *Conn) consumed(n int) {
	c.fwdCount += uint32(n)
	news := c.fwdCount - c.advertised
	if news == 0 || c.peerShut&shutdownSend != 0 || c.state != open {
		return
	}
	window := min(c.alloc, c.peerAlloc)
	if c.rxCount-c.advertised >= window/2 && news >= window/4 {
		c.pending |= pendCredit
		c.d.senders.push(c)
		return
	}
	c.d.armCredit()
}

// armCredit has advertise called soon.
func (d *Device) armCredit() {
	switch {
	case d.creditArmed || d.err != nil:
		return
	case d.creditTimer == nil:
		d.creditTimer = time.AfterFunc(creditDelay, d.advertise)
	default:
		d.creditTimer.Reset(creditDelay)
	}
	d.creditArmed = true
}

// advertise tells the guest all news about its credit.
func (d *Device) advertise() {
	d.mu.Lock()
	defer d.unlock()
	d.creditArmed = false
	for _, c := range d.conns {
		if c.fwdCount != c.advertised && c.peerShut&shutdownSend == 0 && c.state == open {
			c.pending |= pendCredit
			d.senders.push(c)
		}
	}
	d.flush()
}
