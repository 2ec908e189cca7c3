//go:build linux

// Package portmirror gives the two sides of a virtual machine the TCP ports of
// each other, so that a pod with the host's network and the host have one set
// of them: what listens on one side is reached at the same address of the
// other, and a port that is taken on one is taken on both. Both sides run it.
//
// Contract. A Mirror looks at what listens in its network namespace a few times
// a second, tells the other side, and opens what the other side tells: at the
// same address, any address for any address and loopback for loopback. Each
// connection to it is made anew on the other side, to the address that it came
// to, and relayed (package forward). A socket that has gone on the other side is
// closed here; connections of it stay. What a Mirror has opened is never told.
// Everything it has opened ends with Run.
//
// What cannot be opened, because something on this side has the port already or
// because there is no such address, is an error for Config.Failed, and tried
// again whenever something changes here.
//
// Concurrency: Run is called once; Offers from any goroutine.
//
// Not guaranteed: that a socket is seen that lives for less than Interval; the
// address of a client, which is one of the other side's own; addresses with a
// zone (link-local ones), which are left out.
package portmirror

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/forward"
	"github.com/vmrt/vmrt/pkg/listening"
	"github.com/vmrt/vmrt/pkg/relay"
)

// Interval is how often a Mirror looks at its own side. A look costs the host
// some 0.1 ms.
const Interval = 250 * time.Millisecond

// hearPause is the least time between two lists of the other side that are
// taken: each can have a thousand sockets opened here, and an honest side sends
// one an Interval.
const hearPause = Interval / 5

// Namespace runs functions in a network namespace.
type Namespace interface {
	Do(ctx context.Context, f func() error) error
}

// Config says between what a Mirror stands.
type Config struct {
	// Namespace is where the ports are. Nil: the process's own.
	Namespace Namespace
	// Dial connects to an address of the other side. It is called from any
	// goroutine and returns soon after ctx has ended.
	Dial func(ctx context.Context, to netip.AddrPort) (relay.Conn, error)
	// MaxConns is the most connections at once that come from this side.
	MaxConns int
	// DialTimeout bounds Dial.
	DialTimeout time.Duration
	// Failed is told once of each socket that cannot be opened here.
	Failed func(s listening.Socket, err error)
	// First is set on the side that tells first.
	First bool
}

// Stream carries the lists. api.Agent_MirrorPortsClient and its server are
// some.
type Stream interface {
	Send(*api.ListeningPorts) error
	Recv() (*api.ListeningPorts, error)
}

// Mirror is one side.
type Mirror struct {
	cfg    Config
	server *forward.Server

	mu     sync.Mutex
	told   []listening.Socket            // guarded by mu; what the other side knows
	wanted []listening.Socket            // guarded by mu; what the other side has told
	opened map[listening.Socket]*opened  // guarded by mu; by what was told
	failed map[listening.Socket]struct{} // guarded by mu; reported
	closed bool                          // guarded by mu
}

// New returns a Mirror that does nothing yet.
func New(cfg Config) *Mirror {
	return &Mirror{
		cfg:    cfg,
		server: forward.New(forward.Config{Name: "port mirror", MaxConns: cfg.MaxConns, DialTimeout: cfg.DialTimeout}),
		opened: make(map[listening.Socket]*opened),
		failed: make(map[listening.Socket]struct{}),
	}
}

// Run mirrors until the stream or ctx ends, or something is wrong with either
// side, and returns why. It calls ready once the first list of the other side
// was opened here. The stream must end soon after ctx has.
func (m *Mirror) Run(ctx context.Context, stream Stream, ready func()) error {
	defer m.close()
	if m.cfg.First {
		if err := m.tell(stream); err != nil {
			return err
		}
	}
	if err := m.hear(stream); err != nil {
		return err
	}
	if !m.cfg.First {
		if err := m.tell(stream); err != nil {
			return err
		}
	}
	ready()
	heard := make(chan error, 1)
	go func() {
		for {
			if err := m.hear(stream); err != nil {
				heard <- err
				return
			}
			select {
			case <-time.After(hearPause):
			case <-ctx.Done():
			}
		}
	}()
	tick := time.NewTicker(Interval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case err := <-heard:
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if err := m.tell(stream); err != nil {
			return err
		}
	}
}

// tell sends what listens here, if that has changed.
func (m *Mirror) tell(stream Stream) error {
	local, changed, failures, err := m.look()
	m.report(failures)
	if err != nil {
		return fmt.Errorf("list listening sockets: %w", err)
	}
	if !changed {
		return nil
	}
	if err := stream.Send(encode(local)); err != nil {
		return fmt.Errorf("send listening sockets: %w", err)
	}
	return nil
}

// look lists what listens here, without what was opened for the other side.
func (m *Mirror) look() (local []listening.Socket, changed bool, failures []failure, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []listening.Socket
	err = m.inside(func() (err error) {
		all, err = listening.List()
		return err
	})
	if err != nil {
		return nil, false, nil, err
	}
	own := make(map[listening.Socket]bool, len(m.opened))
	for _, o := range m.opened {
		own[o.socket] = true
	}
	for _, s := range all {
		if !own[s] && mirrored(s) {
			local = append(local, s)
		}
	}
	slices.SortFunc(local, compare)
	local = local[:min(len(local), api.MaxListeningPorts)]
	if m.told != nil && slices.Equal(local, m.told) {
		return local, false, nil, nil
	}
	m.told = append([]listening.Socket{}, local...)
	// What has gone here may be what was in the way.
	return local, true, m.apply(), nil
}

// mirrored reports whether a socket has an address that means something on the
// other side.
func mirrored(s listening.Socket) bool {
	ip := s.Addr.Addr()
	return !ip.IsLinkLocalUnicast() && !ip.IsMulticast() && s.Addr.Port() != 0
}

func compare(a, b listening.Socket) int {
	if c := a.Addr.Compare(b.Addr); c != 0 {
		return c
	}
	switch {
	case a.V6Only == b.V6Only:
		return 0
	case a.V6Only:
		return 1
	}
	return -1
}

// hear takes a list of the other side.
func (m *Mirror) hear(stream Stream) error {
	list, err := stream.Recv()
	if err != nil {
		return fmt.Errorf("receive listening sockets: %w", err)
	}
	sockets, err := decode(list)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.wanted = sockets
	failures := m.apply()
	m.mu.Unlock()
	m.report(failures)
	return nil
}

// Offers reports whether the other side was told of a socket that takes
// connections to an address.
func (m *Mirror) Offers(to netip.AddrPort) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.ContainsFunc(m.told, func(s listening.Socket) bool { return takes(s, to) })
}

// takes reports whether a socket takes connections to an address.
func takes(s listening.Socket, to netip.AddrPort) bool {
	ip := s.Addr.Addr()
	switch {
	case s.Addr.Port() != to.Port():
		return false
	case !ip.IsUnspecified():
		return ip == to.Addr()
	case to.Addr().Is4():
		return ip.Is4() || !s.V6Only
	}
	return ip.Is6()
}

func (m *Mirror) inside(f func() error) error {
	if m.cfg.Namespace == nil {
		return f()
	}
	return m.cfg.Namespace.Do(context.Background(), f)
}
