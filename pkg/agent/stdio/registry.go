package stdio

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/accept"
)

// Registry holds stream connections that no request has named yet.
type Registry struct {
	limits Limits

	mu      sync.Mutex
	held    int                 // connections in waiting or still sending their header
	waiting map[string]*waiting // by stream name
	closed  bool
}

// waiting is a named connection. acked is closed once the host was told so.
type waiting struct {
	conn  Conn
	timer *time.Timer
	acked chan struct{}
	err   error // of the acknowledgement, valid after acked
}

// NewRegistry returns an empty registry.
func NewRegistry(l Limits) *Registry {
	return &Registry{limits: l, waiting: make(map[string]*waiting)}
}

// Serve takes connections from l until l is closed, which is no error.
func (r *Registry) Serve(l net.Listener) error {
	for {
		c, err := accept.Next(l)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept stream: %w", err)
		}
		conn, ok := c.(Conn)
		if !ok {
			c.Close()
			return fmt.Errorf("accept stream: %T cannot half-close", c)
		}
		if !r.reserve() {
			log.L.Warnf("stream dropped: %d connections are unclaimed", r.limits.Unclaimed)
			conn.Close()
			continue
		}
		go func() {
			if err := r.admit(conn); err != nil {
				log.L.WithError(err).Warn("stream dropped")
			}
		}()
	}
}

func (r *Registry) reserve() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.held >= r.limits.Unclaimed {
		return false
	}
	r.held++
	return true
}

// admit reads the header of conn, holds conn under that name and says so to
// the host. The name must be takeable before the host hears of it, and the
// acknowledgement must precede whatever a taker writes: hence acked.
func (r *Registry) admit(conn Conn) error {
	conn.SetDeadline(time.Now().Add(r.limits.Header))
	name, err := api.ReadStreamHeader(conn)
	if err != nil {
		r.release()
		conn.Close()
		return err
	}
	w := &waiting{conn: conn, acked: make(chan struct{})}
	if err := r.hold(name, w); err != nil {
		conn.Close()
		return err
	}
	_, w.err = conn.Write([]byte{api.StreamAck})
	conn.SetDeadline(time.Time{})
	close(w.acked)
	if w.err != nil {
		r.drop(name, w)
		return fmt.Errorf("acknowledge stream %s: %w", name, w.err)
	}
	return nil
}

func (r *Registry) release() {
	r.mu.Lock()
	r.held--
	r.mu.Unlock()
}

func (r *Registry) hold(name string, w *waiting) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		r.held--
		return fmt.Errorf("hold stream %s: %w", name, net.ErrClosed)
	}
	if _, ok := r.waiting[name]; ok {
		r.held--
		return fmt.Errorf("hold stream %s: %w", name, errdefs.ErrAlreadyExists)
	}
	r.waiting[name] = w
	w.timer = time.AfterFunc(r.limits.Claim, func() {
		if r.drop(name, w) {
			log.L.Warnf("stream %s dropped: not claimed within %v", name, r.limits.Claim)
		}
	})
	return nil
}

// drop closes w if nobody took it, and reports whether it did.
func (r *Registry) drop(name string, w *waiting) bool {
	r.mu.Lock()
	mine := r.waiting[name] == w
	if mine {
		delete(r.waiting, name)
		r.held--
	}
	r.mu.Unlock()
	if mine {
		w.timer.Stop()
		w.conn.Close()
	}
	return mine
}

// Take returns the connection called name, which becomes the caller's. Of two
// takers one gets it; the error of the other is errdefs.ErrNotFound.
func (r *Registry) Take(name string) (Conn, error) {
	r.mu.Lock()
	w, ok := r.waiting[name]
	if ok {
		delete(r.waiting, name)
		r.held--
	}
	r.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("stream %s: %w", name, errdefs.ErrNotFound)
	}
	w.timer.Stop()
	<-w.acked // bounded: admit writes with a deadline
	if w.err != nil {
		w.conn.Close()
		return nil, fmt.Errorf("stream %s: %w: %w", name, errdefs.ErrNotFound, w.err)
	}
	return w.conn, nil
}

// Close drops every connection that nobody took and admits no more.
func (r *Registry) Close() {
	r.mu.Lock()
	r.closed = true
	all := r.waiting
	r.waiting = make(map[string]*waiting)
	r.held -= len(all)
	r.mu.Unlock()
	for _, w := range all {
		w.timer.Stop()
		w.conn.Close()
	}
}
