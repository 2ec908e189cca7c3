//go:build linux

// Package forward serves listeners whose connections are each relayed to a
// connection on the other side of a virtual machine.
//
// Contract. A Server has any number of listeners, which come and go; the
// connections that came from one stay when it is closed. For each the other
// side is dialled, and bytes, the end of either direction and resets are
// relayed (package relay) for as long as both sides like. A dial that fails
// resets the connection. The number of connections and the time for a dial are
// bounded. Close ends everything.
//
// Concurrency: every method may be called from any goroutine.
//
// Not guaranteed: see package relay for resets.
package forward

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/containerd/log"

	"github.com/vmrt/vmrt/pkg/relay"
)

// DialFunc connects to the other side on behalf of a connection that was
// accepted. It returns soon after ctx has ended.
type DialFunc func(ctx context.Context, accepted *net.TCPConn) (relay.Conn, error)

// Config bounds a server.
type Config struct {
	// Name is what the log calls it.
	Name string
	// MaxConns is the most connections at once. One more is reset.
	MaxConns int
	// DialTimeout bounds a dial.
	DialTimeout time.Duration
}

// Server relays connections.
type Server struct {
	cfg     Config
	ctx     context.Context // of dials, ends with Close
	cancel  context.CancelFunc
	slots   chan struct{}
	running sync.WaitGroup

	mu        sync.Mutex
	listeners map[*net.TCPListener]struct{} // guarded by mu; nil once closed
	conns     map[net.Conn]struct{}         // guarded by mu; nil once closed
}

// New returns a server without listeners.
func New(cfg Config) *Server {
	s := &Server{
		cfg:       cfg,
		slots:     make(chan struct{}, cfg.MaxConns),
		listeners: make(map[*net.TCPListener]struct{}),
		conns:     make(map[net.Conn]struct{}),
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Serve takes connections from l, which it takes over, until it is closed: by
// the caller, or by Close. It returns at once.
func (s *Server) Serve(l *net.TCPListener, dial DialFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.listeners == nil {
		l.Close()
		return
	}
	s.listeners[l] = struct{}{}
	s.running.Go(func() { s.accept(l, dial) })
}

// Close stops to take connections, resets those that there are, and returns
// when nothing runs any more. Idempotent.
func (s *Server) Close() error {
	s.cancel()
	s.mu.Lock()
	listeners, conns := s.listeners, s.conns
	s.listeners, s.conns = nil, nil
	s.mu.Unlock()
	var errs []error
	for l := range listeners {
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	for c := range conns {
		relay.Abort(c)
	}
	s.running.Wait()
	return errors.Join(errs...)
}

// acceptPause lets a shortage pass.
const acceptPause = 20 * time.Millisecond

func (s *Server) accept(l *net.TCPListener, dial DialFunc) {
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.listeners, l)
	}()
	for {
		conn, err := l.AcceptTCP()
		if s.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			if err == nil {
				relay.Abort(conn)
			}
			return
		}
		if err != nil {
			log.L.WithError(err).Warnf("accept a %s connection", s.cfg.Name)
			select {
			case <-time.After(acceptPause):
			case <-s.ctx.Done():
			}
			continue
		}
		select {
		case s.slots <- struct{}{}:
			s.running.Go(func() {
				defer func() { <-s.slots }()
				s.forward(conn, dial)
			})
		default:
			log.L.Warnf("%s connection to %s dropped: %d are open", s.cfg.Name, conn.LocalAddr(), s.cfg.MaxConns)
			relay.Abort(conn)
		}
	}
}

// forward serves one connection to its end.
func (s *Server) forward(conn *net.TCPConn, dial DialFunc) {
	defer s.untrack(conn)
	if !s.track(conn) {
		relay.Abort(conn)
		return
	}
	other, err := s.connect(conn, dial)
	if err != nil {
		log.L.WithError(err).Debugf("%s to %s", s.cfg.Name, conn.LocalAddr())
		relay.Abort(conn)
		return
	}
	defer s.untrack(other)
	if !s.track(other) {
		relay.Abort(other)
		relay.Abort(conn)
		return
	}
	if err := relay.Join(conn, other); err != nil {
		log.L.WithError(err).Debugf("%s to %s", s.cfg.Name, conn.LocalAddr())
	}
}

func (s *Server) connect(conn *net.TCPConn, dial DialFunc) (relay.Conn, error) {
	ctx, cancel := context.WithTimeout(s.ctx, s.cfg.DialTimeout)
	defer cancel()
	return dial(ctx, conn)
}

// track has Close abort c. It reports whether Close was not called yet.
func (s *Server) track(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conns == nil {
		return false
	}
	s.conns[c] = struct{}{}
	return true
}

func (s *Server) untrack(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}
