//go:build linux

// Package dial is how one side of a virtual machine connects to TCP and UDP
// ports of the other: a connection between the two asks for an address (see
// api.WriteDialRequest), and is then relayed to it. The guest has a Server for
// the host and, in pods with the host's network or with name servers in theirs,
// the host has one for the guest.
//
// Contract. Only addresses that Config.Allow permits can be asked for, as the
// network namespace of Config.Namespace has them. The number of connections,
// the time for a request and the time to connect are bounded; a connection that
// is relayed has no time limit with TCP, and ends with UDP when no datagram
// comes back for Config.Idle.
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
	"time"

	"github.com/containerd/log"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/accept"
	"github.com/vmrt/vmrt/pkg/relay"
)

// Config says what a server does for the other side.
type Config struct {
	// Namespace is where connections are made. Nil: in the process's own
	// network namespace.
	Namespace Namespace
	// Allow returns an error for an address that may not be asked for by a
	// network, api.TCP or api.UDP. Nil: all may. It is called from any
	// goroutine.
	Allow func(network string, to netip.AddrPort) error
	// Conns is the most connections at once.
	Conns int
	// Request bounds the time until a request was read, and until its answer
	// was written.
	Request time.Duration
	// Connect bounds the time to connect to the port.
	Connect time.Duration
	// Idle is how long a connection by UDP waits for the next datagram from
	// the port.
	Idle time.Duration
}

// Namespace runs functions in a network namespace.
type Namespace interface {
	Do(ctx context.Context, f func() error) error
}

// Limits returns a Config without a restriction of addresses, with the limits
// that the agent runs with. The host has a lower bound of connections, and a
// longer one of time.
func Limits() Config {
	return Config{Conns: 1024, Request: 10 * time.Second, Connect: 5 * time.Second, Idle: 30 * time.Second}
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

// refusal bounds how long a connection that is refused may take to hear it.
const refusal = 20 * time.Millisecond

// Serve takes connections from l until l is closed, which is no error, and
// returns once all of them have ended. The connections that l accepts must be
// able to half-close.
func (s *Server) Serve(l net.Listener) error {
	var serving sync.WaitGroup
	defer serving.Wait()
	for {
		c, err := accept.Next(l)
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
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
	conn.SetDeadline(time.Now().Add(refusal))
	api.WriteDialAnswer(conn, errTooMany)
	conn.Close()
}

// handle serves one connection to its end.
func (s *Server) handle(conn relay.Conn) {
	port, err := s.connect(conn)
	if err != nil {
		conn.Close()
		log.L.WithError(err).Debug("dial")
		return
	}
	switch port := port.(type) {
	case *net.TCPConn:
		err = relay.Join(conn, port)
	case *net.UDPConn:
		err = s.exchange(conn, port)
	}
	if err != nil {
		log.L.WithError(err).Debugf("relay to %s", port.RemoteAddr())
	}
}

// connect reads the request, connects, and answers. The port is a *net.TCPConn
// or a *net.UDPConn.
func (s *Server) connect(conn net.Conn) (net.Conn, error) {
	conn.SetDeadline(time.Now().Add(s.cfg.Request))
	network, to, err := api.ReadDialRequest(conn)
	if err != nil {
		return nil, err
	}
	var port net.Conn
	if s.cfg.Allow != nil {
		err = s.cfg.Allow(network, to)
	}
	if err == nil {
		port, err = s.dial(network, to)
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
	return port, nil
}

// dial connects in the namespace. There, only addresses of its own are asked
// for, so that a connection is made or refused at once: the namespace's thread
// is not held up.
func (s *Server) dial(network string, to netip.AddrPort) (port net.Conn, err error) {
	connect := func() error {
		port, err = s.dialer.DialContext(context.Background(), network, to.String())
		return err
	}
	if s.cfg.Namespace == nil {
		err = connect()
		return port, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), s.cfg.Connect)
	defer cancel()
	err = s.cfg.Namespace.Do(ctx, connect)
	return port, err
}

// exchange relays datagrams until the other side closes the connection, or no
// more come from the port.
func (s *Server) exchange(conn net.Conn, port *net.UDPConn) error {
	var sending sync.WaitGroup
	defer sending.Wait()
	defer conn.Close()
	defer port.Close()
	sending.Go(func() {
		defer port.Close()
		for {
			b, err := api.ReadDatagram(conn)
			if err == nil {
				_, err = port.Write(b)
			}
			if err != nil {
				return // whatever it is, the reader notices
			}
		}
	})
	b := make([]byte, api.MaxDatagram)
	for {
		port.SetReadDeadline(time.Now().Add(s.cfg.Idle))
		n, err := port.Read(b)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		conn.SetWriteDeadline(time.Now().Add(s.cfg.Request))
		if err := api.WriteDatagram(conn, b[:n]); err != nil {
			return err
		}
	}
}
