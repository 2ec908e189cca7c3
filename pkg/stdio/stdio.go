// Package stdio is the host side of a process's standard streams. It copies
// between what containerd names (FIFOs, files, logging binaries, streams of
// containerd's streaming service) and one connection to the guest for each
// stream, so that a client sees what it would see of containerd's own runc shim.
//
// The contract:
//
//   - Nothing here delays the report of an exit. Streams end on their own:
//     a host end is closed once the guest has ended the stream and the last
//     byte was handed over, which is what clients wait for before they delete.
//     Clients that do not wait for it are those of Drain and Settle.
//   - A byte that arrived before the guest ended a stream is delivered, however
//     late Drain is called. Only Close discards.
//   - A client that does not read blocks its own stream alone. Each stream
//     holds at most one buffer, and none while it is idle; everything else
//     waits in the guest.
//   - A destination that refuses a write (a full disk, a logger that has died)
//     loses those bytes, with a warning in the log. It never blocks the
//     process.
//   - The process reads the end of its stdin once CloseStdin was called and
//     every client has closed its write end, after all that was written.
//   - What is written while no client has an output open waits for one.
//
// An IO may be used from any goroutine. Not guaranteed: that a client has read
// what its FIFO holds, or a logger has stored what it read; and, as with every
// FIFO, bytes that no client has read are lost if none has the FIFO open when
// the stream ends.
package stdio

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/containerd/log"

	"github.com/vmrt/vmrt/pkg/streaming"
)

// Config is what containerd says about the streams of a process. All names
// empty and no terminal means a process without streams.
type Config struct {
	// Namespace is containerd's namespace. Logging binaries are told.
	Namespace string
	// ID is the container's id, or the exec id of an additional process.
	// Logging binaries are told, and errors name it.
	ID string
	// Stdin is the path of a FIFO, or the URI of a stream.
	Stdin string
	// StdinAfter, unless nil, delays the opening of Stdin until it is closed.
	// A client that writes notices the opening, may come to its end at once,
	// and says so with a request about the process, which must be known then.
	// Streams of Streaming have an end of their own and do not wait.
	StdinAfter <-chan struct{}
	// Stdout and Stderr are each the path of a FIFO or of an existing file,
	// or the URI of a stream:
	//
	//	ttrpc+unix:///path?streaming_id=id
	//
	// Stdout may be another URI instead, which then stands for both streams:
	//
	//	file:///path                  append to a file
	//	binary:///path?key=value      a logging binary
	//	binary-v2:///path?key=value   the same, which must say that it is ready
	Stdout, Stderr string
	// Terminal says that the process has a terminal: its output is one
	// stream, stdout.
	Terminal bool
	// Streaming has the streams that URIs name. Nil refuses them.
	Streaming *streaming.Service
}

func (c Config) null() bool { return c.Stdin == "" && c.Stdout == "" && c.Stderr == "" }

// Conn is a stream to or from the guest. CloseWrite ends it towards the guest.
type Conn interface {
	net.Conn
	CloseWrite() error
}

// timing holds the package's bounds.
type timing struct {
	// open bounds Open. The client's reader and a logging binary must be
	// there by then; runc's shim allows as much. Of a stream whose client has
	// not come by then the log tells.
	open time.Duration
	// quiet is how long Settle waits for output that does not move.
	quiet time.Duration
	// idle is how long a stream keeps its buffer after the last byte.
	idle time.Duration
	// pumps bounds how long Close waits for copying to end.
	pumps  time.Duration
	logger loggerTiming
}

var defaultTiming = timing{
	open:   30 * time.Second,
	quiet:  time.Second,
	idle:   2 * time.Second,
	pumps:  5 * time.Second,
	logger: defaultLoggerTiming,
}

// IO is the host side of one process's streams.
type IO struct {
	id     string
	log    *log.Entry
	timing timing

	// Set by Open and not changed. A nil input or output is a stream that
	// the guest need not connect.
	stdin          input
	stdout, stderr output
	logger         *logger

	shutdown func() error // once

	mu       sync.Mutex
	attached bool
	closed   bool
	conns    []Conn
	feeding  []<-chan struct{} // closed when copying to stdin has ended
	draining []<-chan struct{} // closed when an output was delivered
}

// Open opens or starts everything on the host: FIFOs, files, a logging binary.
// Nothing flows before Attach. An output FIFO needs a reader, which Open waits
// for until ctx ends or 30 s have passed. It does not wait for the client of a
// stream, which can come at any time. An error leaves nothing behind.
//
// Messages about the streams go to the logger of ctx, until Close.
func Open(ctx context.Context, cfg Config) (*IO, error) {
	return open(ctx, cfg, defaultTiming)
}

func open(ctx context.Context, cfg Config, t timing) (_ *IO, err error) {
	s := &IO{id: cfg.ID, log: log.G(ctx).WithField("stdio", cfg.ID), timing: t}
	s.shutdown = sync.OnceValue(s.close)
	ctx, cancel := context.WithTimeout(ctx, t.open)
	defer cancel()
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	// Stdin never waits, and a client may open its ends one after another.
	if cfg.Stdin != "" {
		if s.stdin, err = openStdin(cfg); err != nil {
			return nil, s.errorf("open stdin "+cfg.Stdin, err)
		}
	}
	if err := s.openOutputs(ctx, cfg); err != nil {
		return nil, err
	}
	return s, nil
}

// errorf names the operation and the process.
func (s *IO) errorf(op string, err error) error {
	return fmt.Errorf("%s of %s: %w", op, s.id, err)
}

// Wants says for which streams Attach needs a connection. A process without a
// terminal that has any stream has both outputs, because the task service in
// the guest knows no other; what has no name here is read and discarded. The
// same holds for the output of a terminal.
func (s *IO) Wants() (stdin, stdout, stderr bool) {
	return s.stdin != nil, s.stdout != nil, s.stderr != nil
}

// Attach starts to copy, over one connection for each stream that Wants names,
// and takes ownership of all of them. A stream that came without its connection
// ends at once. Attach is for the first call; a later one, or one after Close,
// closes its connections.
func (s *IO) Attach(stdin, stdout, stderr Conn) {
	for _, conn := range s.attach(stdin, stdout, stderr) {
		conn.Close()
	}
}

// attach returns the connections that have no use.
func (s *IO) attach(stdin, stdout, stderr Conn) (useless []Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	usable := !s.attached && !s.closed
	s.attached = true
	own := func(conn Conn, wanted bool) bool {
		switch {
		case conn == nil:
			return false
		case !usable || !wanted:
			useless = append(useless, conn)
			return false
		}
		s.conns = append(s.conns, conn)
		return true
	}
	if own(stdin, s.stdin != nil) {
		s.feeding = append(s.feeding, start(func() { s.feed(stdin) }))
	} else if usable && s.stdin != nil {
		s.feeding = append(s.feeding, start(s.stdin.finish))
	}
	for _, o := range []struct {
		name string
		conn Conn
		dst  output
	}{{"stdout", stdout, s.stdout}, {"stderr", stderr, s.stderr}} {
		if own(o.conn, o.dst != nil) {
			s.draining = append(s.draining, start(func() { s.deliver(o.name, o.conn, o.dst) }))
		} else if usable && o.dst != nil {
			s.draining = append(s.draining, start(o.dst.finish))
		}
	}
	return useless
}

// start runs f and returns a channel that is closed when f has returned.
func start(f func()) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	return done
}

// feed copies the client's stdin to the guest. The connection stays open after
// its half-close: the guest may still be reading.
func (s *IO) feed(conn Conn) {
	defer s.stdin.finish()
	err := s.stdin.copyTo(conn, s.timing.idle)
	if err == nil {
		err = conn.CloseWrite()
	}
	if err != nil {
		// The usual reason: the process has ended or closed its stdin.
		// The client then reads EPIPE, as it would of runc.
		conn.Close()
		s.log.WithError(err).Debug("stdin ended early")
	}
}

// deliver copies one output of the guest to dst.
func (s *IO) deliver(name string, conn Conn, dst output) {
	w := &delivery{dst: dst, refused: func(err error) {
		s.log.WithError(err).Warnf("%s is refused, dropping it", name)
	}}
	err := fromGuest(w, conn, s.timing.idle)
	conn.Close()
	dst.finish()
	if w.dropped > 0 {
		s.log.Warnf("%d bytes of %s dropped", w.dropped, name)
	}
	if err != nil && !s.isClosed() {
		s.log.WithError(err).Warnf("%s ended early", name)
	}
}

func (s *IO) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// CloseStdin says that no further client will open stdin. The process reads
// the end after all that was written, once those that have it open have closed
// it. CloseStdin is idempotent and never blocks.
func (s *IO) CloseStdin() error {
	if s.stdin == nil {
		return nil
	}
	return s.stdin.release()
}

// Drain waits until the guest has ended every output and all of it was
// delivered, or for ctx. Output is delivered once it is in the client's FIFO or
// in the file; what goes to a logging binary, once the binary has read it; and
// what goes to a stream, once the client has read the end and closed its
// connection, or has had half a second for that. Without Attach there is
// nothing to wait for.
func (s *IO) Drain(ctx context.Context) error {
	s.mu.Lock()
	draining := s.draining
	s.mu.Unlock()
	if wait(ctx, draining) {
		return nil
	}
	return s.errorf("drain output", errors.Join(append([]error{ctx.Err()}, s.absent()...)...))
}

// wait returns true when all channels are closed and false when ctx ends first.
func wait(ctx context.Context, channels []<-chan struct{}) bool {
	for _, c := range channels {
		select {
		case <-c:
			continue
		default:
		}
		select {
		case <-c:
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// Close ends all streams, with whatever they still hold, and the logging
// binary: it gets SIGTERM 2 s after its input has ended, or at once if there
// was none, and SIGKILL 12 s after Close. The error tells of a binary that had
// to be killed or that failed, and is in the log already. Close is idempotent,
// and every call returns when the first is done.
func (s *IO) Close() error { return s.shutdown() }

func (s *IO) close() error {
	s.mu.Lock()
	s.closed = true
	conns := s.conns
	s.conns = nil
	pumps := append(append([]<-chan struct{}{}, s.feeding...), s.draining...)
	s.mu.Unlock()

	for _, conn := range conns {
		conn.Close()
	}
	if s.stdin != nil {
		s.stdin.close()
	}
	for _, o := range []output{s.stdout, s.stderr} {
		if o != nil {
			o.abort()
		}
	}
	var errs []error
	ctx, cancel := context.WithTimeout(context.Background(), s.timing.pumps)
	defer cancel()
	if !wait(ctx, pumps) {
		errs = append(errs, s.errorf("close streams", errors.New("a copy did not end")))
	}
	if s.logger != nil {
		errs = append(errs, s.logger.stop())
	}
	return errors.Join(errs...)
}
