package streaming

import (
	"fmt"
	"math"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// window is how many bytes a client may send before the process has to take
// some. As much again may be on its way to the process.
const window = 32 << 10

// mode is what a stream is to its process.
type mode int

const (
	// unclaimed streams have no process.
	unclaimed mode = iota
	output
	input
	// discarding is an input whose process reads no more. A client that
	// still writes is not held up: it would wait for ever, since containerd's
	// end does not notice the end of a stream while it waits to write.
	discarding
	// finished is an output after its last byte.
	finished
	closed
)

// stream is what a client and a process share.
type stream struct {
	id     string
	limits limits

	// Guarded by the service's mu:

	claimed bool
	// joined is the number of clients, with those that are about to enter or
	// leave.
	joined int

	mu sync.Mutex
	// changed is closed and replaced when anything below has changed.
	changed chan struct{}
	mode    mode
	// client is the one that has the stream, or nil.
	client *client
	// visited is true once there was a client.
	visited bool
	// buf is what an input's clients have sent.
	buf []byte
	// released is true when an input ends with its last client.
	released bool
	// moved counts what goes on: messages, clients that come and go.
	moved uint64
}

func newStream(id string, l limits) *stream {
	return &stream{id: id, limits: l, changed: make(chan struct{})}
}

// touch wakes all that wait for a change. mu is held.
func (st *stream) touch() {
	st.moved++
	close(st.changed)
	st.changed = make(chan struct{})
}

// begin makes an unclaimed stream that of a process.
func (st *stream) begin(in bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.mode = output
	if in {
		st.mode = input
	}
	st.touch()
}

// enter gives the stream to a client, to which nothing is sent before start.
func (st *stream) enter(c *client) {
	st.mu.Lock()
	old := st.client
	st.client, st.visited = c, true
	over := st.mode == finished || st.mode == closed
	st.touch()
	st.mu.Unlock()
	if old != nil {
		old.finish(fmt.Errorf("stream %s: another client has taken it over: %w", st.id, errdefs.ErrAborted))
	}
	if over {
		c.finish(nil)
	}
}

// start lets messages go to a client that has entered.
func (st *stream) start(c *client) {
	st.mu.Lock()
	c.started = true
	st.touch()
	st.mu.Unlock()
	st.grant()
}

// leave is the end of a client.
func (st *stream) leave(c *client) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.client == c {
		st.client = nil
		st.touch()
	}
}

// end changes the mode to one in which clients have nothing to do, and returns
// the client that was told so.
func (st *stream) end(m mode) *client {
	st.mu.Lock()
	if st.mode != closed {
		st.mode = m
	}
	st.buf = nil
	c := st.client
	st.touch()
	st.mu.Unlock()
	if c != nil {
		c.finish(nil)
	}
	return c
}

func (st *stream) close() { st.end(closed) }

// allowed adds to what the client takes.
func (st *stream) allowed(c *client, n int32) error {
	if n <= 0 {
		return fmt.Errorf("WindowUpdate of %d: %w", n, errdefs.ErrInvalidArgument)
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	if c.credit += int64(n); c.credit > math.MaxInt32 {
		return fmt.Errorf("window of %d bytes: %w", c.credit, errdefs.ErrInvalidArgument)
	}
	c.unread = 0
	st.touch()
	return nil
}

// received takes what the client has sent.
func (st *stream) received(c *client, p []byte) error {
	st.mu.Lock()
	if len(p) > c.granted {
		granted := c.granted
		st.mu.Unlock()
		return fmt.Errorf("client has sent %d bytes when it may send %d: %w", len(p), granted, errdefs.ErrInvalidArgument)
	}
	c.granted -= len(p)
	if st.mode == input && st.client == c {
		st.buf = append(st.buf, p...)
	}
	st.touch()
	st.mu.Unlock()
	st.grant()
	return nil
}

// grant allows an input's client to send more. It does so only when all that
// was allowed before has come: writing to a connection that the client has
// closed in the meantime makes ttrpc forget what it has not read yet, and so
// there is nothing.
func (st *stream) grant() {
	st.mu.Lock()
	c := st.client
	room := window - len(st.buf)
	if c == nil || !c.started || c.granted > 0 || room < window/2 || st.mode != input && st.mode != discarding {
		st.mu.Unlock()
		return
	}
	c.granted = room
	st.mu.Unlock()
	// An error means that the client is gone, which is noticed elsewhere.
	_ = sendWindow(c.srv, room)
}

// await waits for a change after one that was seen under mu, or for d if d is
// not 0.
func await(changed <-chan struct{}, d time.Duration) {
	if d == 0 {
		<-changed
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-changed:
	case <-timer.C:
	}
}

// connected reports whether the stream has a client, and moved what has gone
// on, to be compared with a later value.
func (st *stream) state() (connected bool, moved uint64, visited bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.client != nil, st.moved, st.visited
}
