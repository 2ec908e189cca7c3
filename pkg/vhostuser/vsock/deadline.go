package vsock

import (
	"net"
	"time"
)

// deadline is a point in time after which one direction of a connection
// fails. Device.mu guards it.
type deadline struct {
	timer   *time.Timer
	expired bool
}

func (l *deadline) stop() {
	if l.timer != nil {
		l.timer.Stop()
		l.timer = nil
	}
}

// set changes the deadline of a connection. The zero time is none.
func (l *deadline) set(c *Conn, t time.Time) {
	l.stop()
	l.expired = false
	if t.IsZero() {
		return
	}
	left := time.Until(t)
	if left <= 0 {
		l.expired = true
		c.wake()
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(left, func() {
		c.d.mu.Lock()
		defer c.d.unlock()
		// The deadline may have been changed while this waited for the mutex.
		if l.timer == timer {
			l.expired = true
			c.wake()
		}
	})
	l.timer = timer
}

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error {
	return c.setDeadlines(t, &c.readLimit, &c.writeLimit)
}

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.setDeadlines(t, &c.readLimit) }

// SetWriteDeadline implements net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.setDeadlines(t, &c.writeLimit) }

func (c *Conn) setDeadlines(t time.Time, limits ...*deadline) error {
	c.d.mu.Lock()
	defer c.d.unlock()
	if c.closed {
		return c.opError("set", net.ErrClosed)
	}
	for _, l := range limits {
		l.set(c, t)
	}
	return nil
}
