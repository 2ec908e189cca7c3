//go:build linux

// Package names answers in the guest for name servers that listen on loopback
// addresses of the pod's network namespace on the host, such as Docker's at
// 127.0.0.11: what is asked at such an address of the guest is asked there.
//
// Contract. A Server listens at port 53 of the addresses that Serve names, by
// UDP and TCP, as long as the process lives. Each query by UDP has a connection
// to the host of its own, on which one answer is awaited for Config.Timeout;
// without one the client asks again, as it would without a virtual machine.
// Connections by TCP are relayed. Messages are not looked into. The number of
// queries and connections at once is bounded; one more is not answered.
//
// Concurrency: Serve may be called from any goroutine.
//
// Not guaranteed: that a program of the guest can listen at port 53 of all
// addresses afterwards: the port is taken.
package names

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/forward"
	"github.com/vmrt/vmrt/pkg/relay"
)

// Config says where queries go, and their bounds.
type Config struct {
	// Dial connects to an address on the host by api.TCP or api.UDP. It
	// returns soon after ctx has ended.
	Dial func(ctx context.Context, network string, to netip.AddrPort) (relay.Conn, error)
	// Queries is the most queries by UDP at once, and connections by TCP.
	Queries int
	// Timeout bounds a query by UDP, and the time to connect by TCP.
	Timeout time.Duration
	// Port is where queries are taken and asked.
	Port uint16
}

// Server is what listens.
type Server struct {
	cfg   Config
	tcp   *forward.Server
	slots chan struct{}

	mu     sync.Mutex
	served map[netip.Addr]bool // guarded by mu
}

// New returns a server that listens nowhere yet.
func New(cfg Config) *Server {
	return &Server{
		cfg:    cfg,
		tcp:    forward.New(forward.Config{Name: "name server", MaxConns: cfg.Queries, DialTimeout: cfg.Timeout}),
		slots:  make(chan struct{}, cfg.Queries),
		served: make(map[netip.Addr]bool),
	}
}

// Serve listens at an address, unless it does already.
func (s *Server) Serve(addr netip.Addr) error {
	if !addr.Is4() || !addr.IsLoopback() {
		return fmt.Errorf("serve names at %s: want an IPv4 loopback address: %w", addr, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.served[addr] {
		return nil
	}
	if len(s.served) == api.MaxNameServers {
		return fmt.Errorf("serve names at %s: there are %d addresses already: %w", addr, len(s.served), errdefs.ErrResourceExhausted)
	}
	at := netip.AddrPortFrom(addr, s.cfg.Port)
	udp, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return fmt.Errorf("serve names: %w", err)
	}
	var listen net.ListenConfig
	listen.SetMultipathTCP(false) // it is relayed, one hop at a time
	tcp, err := listen.Listen(context.Background(), "tcp4", at.String())
	if err != nil {
		udp.Close()
		return fmt.Errorf("serve names: %w", err)
	}
	s.served[addr] = true
	s.tcp.Serve(tcp.(*net.TCPListener), func(ctx context.Context, _ *net.TCPConn) (relay.Conn, error) {
		return s.cfg.Dial(ctx, api.TCP, at)
	})
	go s.queries(udp, at)
	return nil
}

// queries takes datagrams.
func (s *Server) queries(udp *net.UDPConn, at netip.AddrPort) {
	b := make([]byte, api.MaxDatagram)
	for {
		n, client, err := udp.ReadFromUDPAddrPort(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			log.L.WithError(err).Warnf("take a query at %s", at)
			continue
		}
		select {
		case s.slots <- struct{}{}:
		default:
			log.L.Warnf("query at %s dropped: %d are being asked", at, s.cfg.Queries)
			continue
		}
		query := append([]byte(nil), b[:n]...)
		go func() {
			defer func() { <-s.slots }()
			if err := s.query(udp, client, at, query); err != nil {
				log.L.WithError(err).Debugf("query at %s", at)
			}
		}()
	}
}

// query asks one and sends the answer to the client.
func (s *Server) query(udp *net.UDPConn, client, at netip.AddrPort, query []byte) error {
	ctx, cancel := context.WithTimeout(context.Background(), s.cfg.Timeout)
	defer cancel()
	conn, err := s.cfg.Dial(ctx, api.UDP, at)
	if err != nil {
		return err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	if err := api.WriteDatagram(conn, query); err != nil {
		return err
	}
	answer, err := api.ReadDatagram(conn)
	if err != nil {
		return err
	}
	_, err = udp.WriteToUDPAddrPort(answer, client)
	return err
}
