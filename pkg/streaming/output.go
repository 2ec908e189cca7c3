package streaming

import (
	"io"
	"os"
	"time"
)

// Output is a stream that a process writes to.
type Output struct {
	service *Service
	stream  *stream
}

var _ io.Writer = (*Output)(nil)

// Write sends p, and waits for clients that take it for as long as it needs.
// The only error is os.ErrClosed, after Close.
func (o *Output) Write(p []byte) (int, error) {
	written := 0
	for written < len(p) {
		c, n := o.stream.reserve(len(p) - written)
		if c == nil {
			return written, os.ErrClosed
		}
		// ttrpc takes messages for a moment after the connection has ended.
		if err := sendData(c.srv, p[written:written+n]); err != nil || c.dead() {
			o.stream.leave(c) // the next client gets this
			continue
		}
		written += n
	}
	return written, nil
}

// reserve waits until a client takes some of n bytes. It returns nil when the
// stream was closed.
func (st *stream) reserve(n int) (*client, int) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for st.mode == output {
		var pause time.Duration
		if c := st.client; c != nil && c.started && c.credit > 0 {
			some := min(int64(n), c.credit, maxData)
			now := time.Now()
			if pause = c.pause(int(some), st.limits.spacing, now); pause == 0 {
				c.credit -= some
				c.unread++
				c.sent = now
				st.moved++
				return c, int(some)
			}
		}
		changed := st.changed
		st.mu.Unlock()
		await(changed, pause)
		st.mu.Lock()
	}
	return nil, 0
}

// Finish ends the stream towards the client that has it and any that comes,
// until Close. It must be called after the last Write. It returns when the
// client has closed its connection, as CRI does once it has read the end, or
// after half a second; at once if there is no client.
func (o *Output) Finish() {
	c := o.stream.end(finished)
	if c == nil || c.closed == nil {
		return
	}
	timer := time.NewTimer(o.stream.limits.farewell)
	defer timer.Stop()
	for {
		o.stream.mu.Lock()
		over, changed := o.stream.mode == closed, o.stream.changed
		o.stream.mu.Unlock()
		if over {
			return
		}
		select {
		case <-c.closed:
			return
		case <-timer.C:
			return
		case <-changed:
		}
	}
}

// Connected reports whether a client has the stream.
func (o *Output) Connected() bool {
	connected, _, _ := o.stream.state()
	return connected
}

// Visited reports whether there ever was a client.
func (o *Output) Visited() bool {
	_, _, visited := o.stream.state()
	return visited
}

// Moved changes whenever something is sent, a client allows more, or comes or
// goes.
func (o *Output) Moved() uint64 {
	_, moved, _ := o.stream.state()
	return moved
}

// ID is the stream's.
func (o *Output) ID() string { return o.stream.id }

// Close gives the stream up, ends a Write or a Finish that waits, and ends the
// client, whatever it has not got. Idempotent.
func (o *Output) Close() { o.service.release(o.stream) }
