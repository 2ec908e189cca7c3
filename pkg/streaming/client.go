package streaming

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	api "github.com/containerd/containerd/api/services/streaming/v1"
	transferapi "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/anypb"
)

// client is one client's call of Stream.
type client struct {
	srv api.TTRPCStreaming_StreamServer
	ctx context.Context
	// closed is closed when the connection has ended; nil if that cannot be
	// known.
	closed <-chan struct{}
	// left is closed when nothing more will be received, with fault set if
	// the client has broken the protocol.
	left  chan struct{}
	fault error
	// end is closed to end the call with err.
	end     chan struct{}
	endOnce sync.Once
	err     error

	// The rest is guarded by the mu of the client's stream.

	// started is true once the client has its answer.
	started bool
	// credit is how many bytes the client takes.
	credit int64
	// granted is how many bytes the client may still send.
	granted int
	// unread is how many messages were sent since the client's last
	// WindowUpdate, and sent when the last was.
	unread int
	sent   time.Time
}

func newClient(ctx context.Context, srv api.TTRPCStreaming_StreamServer) *client {
	c := &client{srv: srv, ctx: ctx, left: make(chan struct{}), end: make(chan struct{})}
	if conn := connection(ctx); conn != nil {
		c.closed = conn.Done()
	}
	return c
}

// finish ends the call. Only the first call counts.
func (c *client) finish(err error) {
	c.endOnce.Do(func() {
		c.err = err
		close(c.end)
	})
}

// dead reports whether the call has ended by itself.
func (c *client) dead() bool {
	select {
	case <-c.left:
		return true
	default:
		return c.ctx.Err() != nil
	}
}

// receive takes the client's messages until it has ended the stream or the
// connection. ttrpc gives up a stream whose messages are not taken within a
// second, so this never waits for the process.
func (c *client) receive(st *stream) {
	defer close(c.left)
	for {
		a, err := c.next()
		if err == nil {
			err = st.message(c, a)
		} else if errors.Is(err, io.EOF) || c.ctx.Err() != nil {
			return
		}
		if err != nil {
			c.fault = fmt.Errorf("stream %s: %w", st.id, err)
			return
		}
	}
}

// next returns the next message. When the connection has ended, ttrpc chooses
// at random between saying so and the messages that it still holds: what a
// client has sent before it closed the connection needs more than one try.
func (c *client) next() (*anypb.Any, error) {
	a, err := c.srv.Recv()
	for try := 0; err != nil && !errors.Is(err, io.EOF) && c.ctx.Err() != nil && try < 64; try++ {
		a, err = c.srv.Recv()
	}
	return a, err
}

// message takes one message of the client.
func (st *stream) message(c *client, a *anypb.Any) error {
	m, err := decode(a)
	if err != nil {
		return err
	}
	switch m := m.(type) {
	case *transferapi.WindowUpdate:
		return st.allowed(c, m.Update)
	case *transferapi.Data:
		return st.received(c, m.Data)
	}
	return fmt.Errorf("second %s: %w", typeURL(m), errdefs.ErrInvalidArgument)
}

// These bound the messages that a client may have to read.
const (
	// freeMessages may be sent at any rate after a WindowUpdate.
	freeMessages = 16
	// smallMessage is what a message must carry in bytes so that a client's
	// credit, 128 KiB, is used up before its messages are too many.
	smallMessage = 2 << 10
)

// pause is how long a message of n bytes has to wait.
//
// ttrpc keeps 64 messages for a client that does not read, however small they
// are, and gives up its stream a second after that. WindowUpdates come once in
// 64 KiB and so do not tell. Small messages are therefore sent a moment apart:
// in that time a busy process fills the next. What is left is a process that
// writes a little now and then to a client that has stopped reading; the client
// then loses the stream, and the process nothing.
func (c *client) pause(n int, spacing time.Duration, now time.Time) time.Duration {
	if n >= smallMessage || c.unread < freeMessages {
		return 0
	}
	return max(0, c.sent.Add(spacing).Sub(now))
}
