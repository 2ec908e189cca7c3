//go:build linux

// Package dial connects the host to TCP ports on the guest's loopback. Each
// connection that it serves asks for one port (see api.PortDial) and is then
// relayed to it.
//
// Contract. Only 127.0.0.1 and ::1 of the network namespace that the process
// is in can be asked for. The number of connections, the time for a request
// and the time to connect are bounded; a connection that is relayed has no
// time limit.
//
// Not guaranteed: any order between connections, and that a container which
// has a network namespace of its own is reached.
package dial

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/relay"
)

// Limits bound what the host can make the agent hold.
type Limits struct {
	// Conns is the most connections at once.
	Conns int
	// Request bounds the time until a request was read, and until its answer
	// was written.
	Request time.Duration
	// Connect bounds the time to connect to the port.
	Connect time.Duration
}

// DefaultLimits returns the limits that the agent runs with. The host has a
// lower bound of connections, and a longer one of time.
func DefaultLimits() Limits {
	return Limits{Conns: 1024, Request: 10 * time.Second, Connect: 5 * time.Second}
}

// errTooMany is the answer to a connection above the limit.
var errTooMany = errors.New("too many connections")

// Server serves dial connections. It may be used from any goroutine.
type Server struct {
	limits Limits
	dialer net.Dialer
	slots  chan struct{}
}

// NewServer returns a server without connections.
func NewServer(l Limits) *Server {
	return &Server{
		limits: l,
		dialer: net.Dialer{Timeout: l.Connect, KeepAlive: -1},
		slots:  make(chan struct{}, l.Conns),
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
			log.L.Warnf("dial dropped: %d connections are open", s.limits.Conns)
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
	conn.SetDeadline(time.Now().Add(s.limits.Request))
	network, number, err := api.ReadDialRequest(conn)
	if err != nil {
		return nil, err
	}
	host := "127.0.0.1"
	if network == api.DialTCP6 {
		host = "::1"
	}
	address := net.JoinHostPort(host, strconv.Itoa(int(number)))
	port, err := s.dialer.DialContext(context.Background(), network, address)
	conn.SetDeadline(time.Now().Add(s.limits.Request))
	if werr := api.WriteDialAnswer(conn, err); werr != nil && err == nil {
		relay.Abort(port)
		err = fmt.Errorf("answer dial of %s: %w", address, werr)
	}
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Time{})
	return port.(*net.TCPConn), nil
}
