//go:build linux

package network

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
)

// Scan reads the network namespace. The error is an *UnsupportedError when
// there is something in it that a virtual machine cannot have, and that is in
// use; see classify.
func Scan(ctx context.Context, ns NetNS) (*Config, error) {
	var cfg *Config
	err := inside(ctx, ns, func(h *netlink.Handle) (err error) {
		cfg, err = scan(h)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read network namespace: %w", err)
	}
	return cfg, nil
}

// netlinkTimeout bounds every answer of the kernel.
const netlinkTimeout = 10 * time.Second

// inside runs f on a thread that is in the network namespace, with a netlink
// socket of that namespace.
func inside(ctx context.Context, ns NetNS, f func(h *netlink.Handle) error) error {
	return ns.Do(ctx, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("netlink socket: %w", err)
		}
		defer h.Close()
		if err := h.SetSocketTimeout(netlinkTimeout); err != nil {
			return fmt.Errorf("netlink socket: %w", err)
		}
		return f(h)
	})
}

// dumpAttempts is how often a list is asked for that changed while it was
// handed over.
const dumpAttempts = 8

// dump calls list until what it returns is of one moment.
func dump[T any](list func() ([]T, error)) ([]T, error) {
	for attempt := 1; ; attempt++ {
		items, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) || attempt == dumpAttempts {
			return items, err
		}
	}
}

// scanner holds what is needed more than once.
type scanner struct {
	handle *netlink.Handle
	links  []netlink.Link
	addrs  map[int][]netlink.Addr
	routes []netlink.Route
	// names are those of the interfaces that the guest will have.
	names map[int]string
}

func scan(h *netlink.Handle) (*Config, error) {
	s := &scanner{handle: h, addrs: make(map[int][]netlink.Addr), names: make(map[int]string)}
	if err := s.read(); err != nil {
		return nil, err
	}
	cfg := &Config{}
	for _, l := range s.links {
		attach, err := s.classify(l)
		if err != nil {
			return nil, err
		}
		if !attach {
			continue
		}
		i, err := s.readInterface(l)
		if err != nil {
			return nil, err
		}
		s.names[i.Index] = i.Name
		cfg.Interfaces = append(cfg.Interfaces, i)
	}
	s.names[loopback] = "lo"
	var err error
	if cfg.Routes, err = s.readRoutes(); err != nil {
		return nil, err
	}
	if cfg.Neighbours, err = s.readNeighbours(); err != nil {
		return nil, err
	}
	if cfg.Rules, err = s.readRules(); err != nil {
		return nil, err
	}
	return cfg, cfg.checkSize()
}

// loopback is the number of the loopback interface in every namespace
// (LOOPBACK_IFINDEX, include/net/flow.h).
const loopback = 1

func (s *scanner) read() error {
	var err error
	if s.links, err = dump(s.handle.LinkList); err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	slices.SortFunc(s.links, func(a, b netlink.Link) int { return cmp.Compare(a.Attrs().Index, b.Attrs().Index) })
	addrs, err := dump(func() ([]netlink.Addr, error) { return s.handle.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		s.addrs[a.LinkIndex] = append(s.addrs[a.LinkIndex], a)
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := dump(func() ([]netlink.Route, error) {
			// RT_TABLE_UNSPEC: those of every table.
			return s.handle.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		s.routes = append(s.routes, routes...)
	}
	return nil
}

// checkSize keeps a configuration within what the guest takes.
func (c *Config) checkSize() error {
	for _, n := range []struct {
		what      string
		have, max int
	}{
		{"interfaces", len(c.Interfaces), api.MaxInterfaces},
		{"routes", len(c.Routes), api.MaxRoutes},
		{"permanent neighbours", len(c.Neighbours), api.MaxNeighbours},
		{"rules", len(c.Rules), api.MaxRules},
	} {
		if n.have > n.max {
			return &UnsupportedError{Object: "the network", Reason: fmt.Sprintf("%d %s, at most %d", n.have, n.what, n.max)}
		}
	}
	for _, i := range c.Interfaces {
		if len(i.Addresses) > api.MaxAddresses {
			return &UnsupportedError{Object: "interface " + i.Name, Reason: fmt.Sprintf("%d addresses, at most %d", len(i.Addresses), api.MaxAddresses)}
		}
	}
	for _, r := range c.Routes {
		if len(r.Hops) > api.MaxHops {
			return &UnsupportedError{Object: "route to " + r.Destination.String(), Reason: fmt.Sprintf("%d hops, at most %d", len(r.Hops), api.MaxHops)}
		}
	}
	return nil
}
