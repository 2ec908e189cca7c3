package sandbox

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/dial"
	"github.com/vmrt/vmrt/pkg/listening"
)

// maxNameConns is the most queries of a guest at once.
const maxNameConns = 128

// nameServers are those that listen on loopback addresses of the pod's network
// namespace on the host, and that the guest may ask.
type nameServers struct {
	mu sync.Mutex // held while the guest is told
	// stop ends what serves the guest's connections, nil while nothing does.
	stop context.CancelFunc // guarded by mu

	// servedMu comes after mu.
	servedMu sync.Mutex
	served   []netip.Addr // guarded by servedMu; changed with mu held as well
}

// ServeNames has programs in the guest reach those of the name servers that
// listen on loopback addresses of the network namespace on the host, as Docker's
// does: at any port, since it has the namespace's packet filter lead there from
// port 53. The others are passed over, and so are those of a pod, which may have
// a container for its name server, and of the host's network.
func (s *Sandbox) ServeNames(ctx context.Context, servers []netip.Addr) error {
	if s.host != nil || s.cfg.Pod != nil {
		return nil
	}
	n := &s.names
	n.mu.Lock()
	defer n.mu.Unlock()
	servers = slices.DeleteFunc(slices.Clone(servers), func(addr netip.Addr) bool {
		return !addr.Is4() || !addr.IsLoopback() || slices.Contains(n.served, addr)
	})
	if len(servers) == 0 {
		return nil
	}
	var listeners []listening.Socket
	err := s.ns.Do(ctx, func() (err error) {
		listeners, err = listening.List()
		return err
	})
	if err != nil {
		return fmt.Errorf("look for name servers of the network namespace: %w", err)
	}
	var found []string
	for _, l := range listeners {
		if addr := l.Addr.Addr(); slices.Contains(servers, addr) && len(n.served) < api.MaxNameServers && !slices.Contains(n.served, addr) {
			found = append(found, addr.String())
			n.allow(addr)
		}
	}
	if len(found) == 0 {
		return nil
	}
	if err := s.network.PassNames(ctx); err != nil {
		return err
	}
	if n.stop == nil {
		// Not of the request: it goes on.
		run, stop := context.WithCancel(context.WithoutCancel(ctx))
		n.stop = stop
		limits := dial.Limits()
		limits.Conns, limits.Allow, limits.Namespace = maxNameConns, n.check, s.ns
		go func() { _ = dial.NewServer(limits).Serve(accepting{ctx: run, transport: s.transport}) }()
	}
	_, err = s.Agent().ServeNames(ctx, &api.NameServers{Addresses: found})
	return wrap("serve names in guest", err)
}

// allow lets the guest ask a name server. n.mu is held.
func (n *nameServers) allow(addr netip.Addr) {
	n.servedMu.Lock()
	defer n.servedMu.Unlock()
	n.served = append(n.served, addr)
}

// check returns an error unless the guest was told of the name server.
func (n *nameServers) check(network string, to netip.AddrPort) error {
	n.servedMu.Lock()
	defer n.servedMu.Unlock()
	if to.Port() != api.PortNames || !slices.Contains(n.served, to.Addr()) {
		return fmt.Errorf("no name server at %s by %s was offered", to, network)
	}
	return nil
}

// close ends the service. The virtual machine has ended.
func (n *nameServers) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.stop != nil {
		n.stop()
	}
}
