// Package qmp is a client of the QEMU Machine Protocol, the JSON protocol that
// QEMU is controlled by (docs/interop/qmp-spec in its sources).
//
// A Client owns one connection. Its methods may be called from any goroutine:
// commands are sent in the order of the calls and answers find their caller by
// id. Each wait is bounded, by the context and by DefaultTimeout where the
// context has no deadline. QEMU is not trusted to behave: messages are bounded,
// and one that breaks the protocol ends the connection and fails all calls.
//
// Not guaranteed: that a command whose call timed out was not carried out.
package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

// DefaultTimeout bounds a call whose context has no deadline.
const DefaultTimeout = 10 * time.Second

// ErrClosed is returned by calls on a client that Close was called on.
var ErrClosed = errors.New("client is closed")

// Client is one QMP connection.
type Client struct {
	conn    net.Conn
	greeted chan Version  // holds at most the one greeting
	done    chan struct{} // closed when the connection has ended

	// writing is a lock with a deadline: it is held by putting a value in.
	writing chan struct{}

	mu            sync.Mutex
	version       Version                    // guarded by mu
	lastID        uint64                     // guarded by mu
	pending       map[uint64]chan<- message  // guarded by mu; nil once the connection has ended
	subscriptions map[*Subscription]struct{} // guarded by mu; nil likewise
	err           error                      // guarded by mu; set once, before done is closed
}

// New starts a client on conn, which it owns from then on. Handshake must come
// before any command.
func New(conn net.Conn) *Client {
	c := &Client{
		conn:          conn,
		greeted:       make(chan Version, 1),
		done:          make(chan struct{}),
		writing:       make(chan struct{}, 1),
		pending:       make(map[uint64]chan<- message),
		subscriptions: make(map[*Subscription]struct{}),
	}
	go c.receive()
	return c
}

// Connect is New and Handshake in one. It closes conn when it fails.
func Connect(ctx context.Context, conn net.Conn) (*Client, error) {
	c := New(conn)
	if err := c.Handshake(ctx); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Handshake waits for QEMU's greeting and leaves the negotiation mode. Events
// come from then on. It is called once.
func (c *Client) Handshake(ctx context.Context) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	select {
	case v := <-c.greeted:
		c.mu.Lock()
		c.version = v
		c.mu.Unlock()
	case <-c.done:
		return fmt.Errorf("qmp greeting: %w", c.Err())
	case <-ctx.Done():
		return fmt.Errorf("qmp greeting: %w", context.Cause(ctx))
	}
	return c.Execute(ctx, "qmp_capabilities", nil, nil)
}

// Version returns what QEMU greeted with; zero before Handshake.
func (c *Client) Version() Version {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.version
}

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err says why the connection ended: ErrClosed after Close, an error that
// matches io.EOF when QEMU closed it. Nil before Done.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close ends the connection. Calls in progress fail with ErrClosed.
// Idempotent.
func (c *Client) Close() error {
	c.end(ErrClosed)
	<-c.done
	return nil
}

// end makes the receiver stop, with reason unless another one came first.
func (c *Client) end(reason error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = reason
	}
	c.mu.Unlock()
	c.conn.Close()
}

// receive delivers messages until the connection ends.
func (c *Client) receive() {
	scanner := bufio.NewScanner(c.conn)
	scanner.Buffer(make([]byte, 4<<10), maxLine)
	var err error
	for err == nil && scanner.Scan() {
		if len(scanner.Bytes()) == 0 {
			continue
		}
		var m message
		if m, err = decode(scanner.Bytes()); err == nil {
			err = c.deliver(m)
		}
	}
	switch {
	case err != nil:
	case errors.Is(scanner.Err(), bufio.ErrTooLong):
		err = fmt.Errorf("message longer than %d bytes", maxLine)
	case scanner.Err() != nil && !errors.Is(scanner.Err(), syscall.ECONNRESET):
		err = scanner.Err()
	default:
		err = fmt.Errorf("QEMU closed the connection: %w", io.EOF)
	}
	c.end(err)

	c.mu.Lock()
	subscriptions := c.subscriptions
	c.pending, c.subscriptions = nil, nil
	for s := range subscriptions {
		s.close(c.err)
	}
	c.mu.Unlock()
	close(c.done)
}

// deliver hands m to whom it is for. An answer that nobody waits for any more
// is dropped.
func (c *Client) deliver(m message) error {
	switch {
	case m.greeting != nil:
		select {
		case c.greeted <- *m.greeting:
			return nil
		default:
			return errors.New("a second greeting")
		}
	case m.event != nil:
		c.publish(*m.event)
		return nil
	case m.id == nil:
		return m.fault // QEMU could not parse what it read
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if answer, ok := c.pending[*m.id]; ok {
		delete(c.pending, *m.id)
		answer <- m // has room for one
	}
	return nil
}

// Execute runs a command and decodes its result. args is encoded as a JSON
// object; nil is none. result may be nil. An error of QEMU's is an *Error.
func (c *Client) Execute(ctx context.Context, command string, args, result any) error {
	return c.execute(ctx, command, args, result, nil)
}

func (c *Client) execute(ctx context.Context, command string, args, result any, rights []byte) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	m, err := c.roundTrip(ctx, command, args, rights)
	switch {
	case err != nil:
		return fmt.Errorf("qmp %s: %w", command, err)
	case m.fault != nil:
		return fmt.Errorf("qmp %s: %w", command, m.fault)
	case result == nil:
		return nil
	}
	if err := json.Unmarshal(m.result, result); err != nil {
		return fmt.Errorf("qmp %s: decode the result: %w", command, err)
	}
	return nil
}

type request struct {
	Execute   string `json:"execute"`
	Arguments any    `json:"arguments,omitempty"`
	ID        uint64 `json:"id"`
}

func (c *Client) roundTrip(ctx context.Context, command string, args any, rights []byte) (message, error) {
	answer := make(chan message, 1)
	c.mu.Lock()
	if c.pending == nil || c.err != nil {
		defer c.mu.Unlock()
		return message{}, c.err
	}
	c.lastID++
	id := c.lastID
	c.pending[id] = answer
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.pending, id)
		c.mu.Unlock()
	}()

	line, err := json.Marshal(request{Execute: command, Arguments: args, ID: id})
	if err != nil {
		return message{}, err
	}
	if err := c.write(ctx, append(line, '\n'), rights); err != nil {
		return message{}, err
	}
	select {
	case m := <-answer:
		return m, nil
	case <-ctx.Done():
		return message{}, context.Cause(ctx)
	case <-c.done:
	}
	// The answer may have come just before the end.
	select {
	case m := <-answer:
		return m, nil
	default:
		return message{}, c.Err()
	}
}

// write sends a whole line or, when ctx ends first, ends the connection if a
// part of the line is out.
func (c *Client) write(ctx context.Context, line, rights []byte) error {
	select {
	case c.writing <- struct{}{}:
		defer func() { <-c.writing }()
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.done:
		return c.Err()
	}
	c.conn.SetWriteDeadline(time.Time{})
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		c.conn.SetWriteDeadline(time.Unix(1, 0))
	})
	n, err := c.send(line, rights)
	if !stop() {
		<-interrupted // or it would hit the next writer
	}
	switch {
	case err == nil:
		return nil
	case n == 0 && ctx.Err() != nil:
		return context.Cause(ctx)
	}
	c.end(fmt.Errorf("write: %w", err))
	return c.Err()
}

// bounded gives ctx a deadline if it has none.
func bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, DefaultTimeout)
}
