//go:build linux

// Package dial is how one side of a virtual machine connects to TCP ports of
// the other: a connection between the two asks for an address (see
// api.WriteDialRequest), and is then relayed to it. The guest has a Server for
// the host and, in pods with the host's network, the host has one for the
// guest.
//
// Contract. Only addresses that Config.Allow permits can be asked for, as the
// network namespace that the process is in has them. The number of
// connections, the time for a request and the time to connect are bounded; a
// connection that is relayed has no time limit.
//
// Not guaranteed: any order between connections, and that a container which
// has a network namespace of its own is reached.
package dial

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/relay"
)

// Config says what a server does for the other side.
type Config struct {
	// Allow returns an error for an address that may not be asked for. Nil:
	// all may. It is called from any goroutine.
	Allow func(to netip.AddrPort) error
	// Conns is the most connections at once.
	Conns int
	// Request bounds the time until a request was read, and until its answer
	// was written.
	Request time.Duration
	// Connect bounds the time to connect to the port.
	Connect time.Duration
}

// Limits returns a Config without a restriction of addresses, with the limits
// that the agent runs with. The host has a lower bound of connections, and a
// longer one of time.
func Limits() Config {
	return Config{Conns: 1024, Request: 10 * time.Second, Connect: 5 * time.Second}
}

// errTooMany is the answer to a connection above the limit.
var errTooMany = errors.New("too many connections")

// Server serves dial connections. It may be used from any goroutine.
type Server struct {
	cfg    Config
	dialer net.Dialer
	slots  chan struct{}
}

// NewServer returns a server without connections.
func NewServer(cfg Config) *Server {
	return &Server{
		cfg:    cfg,
		dialer: net.Dialer{Timeout: cfg.Connect, KeepAlive: -1},
		slots:  make(chan struct{}, cfg.Conns),
	}
}

// acceptPause lets a shortage pass.
const acceptPause = 20 * time.Millisecond

// Serve takes connections from l until l is closed, which is no error, and
// returns once all of them have ended. The connections that l accepts must be
// able to half-close.
func (s *Server) Serve(l net.Listener) error {
	var serving sync.WaitGroup
	defer serving.Wait()
	for {
		c, err := l.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
		case transient(err):
			log.L.WithError(err).Warn("accept dial")
			time.Sleep(acceptPause)
			continue
		case err != nil:
			return fmt.Errorf("accept dial: %w", err)
		}
		conn, ok := c.(relay.Conn)
		if !ok {
			c.Close()
			return fmt.Errorf("accept dial: %T cannot half-close", c)
		}
		select {
		case s.slots <- struct{}{}:
			serving.Go(func() {
				defer func() { <-s.slots }()
				s.handle(conn)
			})
		default:
			log.L.Warnf("dial dropped: %d connections are open", s.cfg.Conns)
			refuse(conn)
		}
	}
}

// refuse answers without waiting: the answer fits into what a connection that
// is new has room for.
func refuse(conn net.Conn) {
	conn.SetDeadline(time.Now().Add(acceptPause))
	api.WriteDialAnswer(conn, errTooMany)
	conn.Close()
}

// transient reports whether accept(2) may succeed the next time.
func transient(err error) bool {
	for _, errno := range []syscall.Errno{unix.ECONNABORTED, unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// handle serves one connection to its end.
func (s *Server) handle(conn relay.Conn) {
	port, err := s.connect(conn)
	if err != nil {
		conn.Close()
		log.L.WithError(err).Debug("dial")
		return
	}
	if err := relay.Join(conn, port); err != nil {
		log.L.WithError(err).Debugf("relay to %s", port.RemoteAddr())
	}
}

// connect reads the request, connects, and answers.
func (s *Server) connect(conn net.Conn) (relay.Conn, error) {
	conn.SetDeadline(time.Now().Add(s.cfg.Request))
	to, err := api.ReadDialRequest(conn)
	if err != nil {
		return nil, err
	}
	var port net.Conn
	if s.cfg.Allow != nil {
		err = s.cfg.Allow(to)
	}
	if err == nil {
		port, err = s.dialer.DialContext(context.Background(), "tcp", to.String())
	}
	conn.SetDeadline(time.Now().Add(s.cfg.Request))
	if werr := api.WriteDialAnswer(conn, err); werr != nil && err == nil {
		relay.Abort(port)
		err = fmt.Errorf("answer dial of %s: %w", to, werr)
	}
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Time{})
	return port.(*net.TCPConn), nil
}
