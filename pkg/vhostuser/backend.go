package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Device is what a Backend makes visible to a guest. The Backend calls it
// without holding the mutex.
type Device interface {
	// Features returns the feature bits of the device type.
	Features() uint64
	// Config returns the device's configuration space, at most 256 bytes,
	// which the caller does not change.
	Config() []byte
	// Kicked is called when there may be new buffers in a queue: after a kick
	// of the driver, when the queue has started, and before it stops. It
	// takes a bounded number of buffers and reports whether to be called
	// again. Calls for one queue do not overlap, those for several may.
	Kicked(queue int) (more bool)
	// Reset is called before queues start that are not those that stopped:
	// a new driver has taken over the device, and knows nothing of the past.
	Reset()
}

// ConfigWriter is a Device whose configuration space the driver may write.
type ConfigWriter interface {
	// WriteConfig stores data from an offset on, both of any value.
	WriteConfig(offset uint32, data []byte) error
}

// Protocol features (vhost-user specification, "Protocol features").
const (
	protocolMQ          = 1 << 0
	protocolReplyAck    = 1 << 3
	protocolConfig      = 1 << 9
	protocolResetDevice = 1 << 13

	protocolFeatures = protocolMQ | protocolReplyAck | protocolConfig | protocolResetDevice
)

// Backend serves one Device to one front end.
type Backend struct {
	dev    Device
	mu     *sync.Mutex // the device's; guards the queues
	queues []*Queue

	// Of the goroutine in Serve.
	socket   *socket
	features uint64
	protocol uint64
	mem      *memory

	// conn is what Stop interrupts, and failure why. Guarded by mu.
	conn    *net.UnixConn
	failure error
}

// NewBackend makes the back end of a device with a number of queues, which mu
// guards from now on.
func NewBackend(dev Device, queues int, mu *sync.Mutex) *Backend {
	b := &Backend{dev: dev, mu: mu, queues: make([]*Queue, queues)}
	for i := range b.queues {
		b.queues[i] = &Queue{call: noEventFD, err: noEventFD}
	}
	return b
}

// Queue returns queue i. It is the same for the Backend's whole life.
func (b *Backend) Queue(i int) *Queue { return b.queues[i] }

// aLongTimeAgo is a deadline that has passed.
var aLongTimeAgo = time.Unix(1, 0)

// Serve speaks with a front end until it hangs up (nil), breaks the protocol,
// Stop or Fail is called, or ctx ends. It closes conn, and when it returns the queues
// are stopped and guest memory is unmapped. To be called once.
func (b *Backend) Serve(ctx context.Context, conn *net.UnixConn) error {
	defer conn.Close()
	if err := b.setConn(conn); err != nil {
		return err
	}
	defer b.setConn(nil)
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(aLongTimeAgo) })
	defer stop()
	b.socket = newSocket(conn)
	defer b.teardown()

	err := b.serve()
	b.mu.Lock()
	failure := b.failure
	b.mu.Unlock()
	switch {
	case failure != nil:
		return failure
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, io.EOF):
		return nil
	}
	return fmt.Errorf("vhost-user: %w", err)
}

// setConn sets what Stop interrupts and returns why it would have by now.
func (b *Backend) setConn(conn *net.UnixConn) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.conn = conn
	return b.failure
}

// Stop makes Serve return err, which is not nil. The first call counts. To be
// called with the mutex held.
func (b *Backend) Stop(err error) {
	if b.failure != nil {
		return
	}
	b.failure = err
	if b.conn != nil {
		b.conn.SetDeadline(aLongTimeAgo)
	}
}

// Fail is Stop for a driver that broke the rules, for errors of Queue.Next
// above all. It tells the front end by the queues' error descriptors.
func (b *Backend) Fail(err error) {
	if b.failure == nil {
		for _, q := range b.queues {
			q.err.signal()
		}
	}
	b.Stop(err)
}

func (b *Backend) serve() error {
	for {
		m, err := b.socket.receive()
		if err != nil {
			return err
		}
		err = b.dispatch(m)
		m.closeFDs()
		if err != nil {
			return fmt.Errorf("%v: %w", m.req, err)
		}
	}
}

// dispatch handles one message and answers it, if it wants an answer.
func (b *Backend) dispatch(m *message) error {
	reply, err := b.handle(m)
	if reply == nil && m.needReply() && b.protocol&protocolReplyAck != 0 {
		reply = u64(0)
		if err != nil {
			reply = u64(1)
		}
	}
	if reply != nil {
		if replyErr := b.socket.reply(m.req, reply); err == nil {
			err = replyErr
		}
	}
	var denied *deniedError
	if errors.As(err, &denied) {
		return nil
	}
	return err
}

// deniedError is a request that is refused without an end to the session.
type deniedError struct{ err error }

func (e *deniedError) Error() string { return e.err.Error() }
func (e *deniedError) Unwrap() error { return e.err }
