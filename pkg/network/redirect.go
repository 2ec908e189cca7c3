//go:build linux

package network

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// filterPriority marks our filters, so that what a shim left behind that was
// killed can be told from filters of others.
const filterPriority = 0x766d

// redirect hands every frame that arrives on interface from to interface to,
// as if that sent it. The host's own stack does not see them.
func redirect(h *netlink.Handle, from, to int) error {
	if err := h.QdiscAdd(ingress(from)); errors.Is(err, unix.EEXIST) {
		if err := makeWay(h, from); err != nil {
			return err
		}
	} else if err != nil {
		return fmt.Errorf("add ingress hook: %w", err)
	}
	f := filter(from)
	f.Actions = []netlink.Action{netlink.NewMirredAction(to)}
	if err := h.FilterAdd(f); err != nil {
		return errors.Join(fmt.Errorf("add redirect: %w", err), removeRedirect(h, from))
	}
	return nil
}

func ingress(link int) *netlink.Ingress {
	return &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: link, Parent: netlink.HANDLE_INGRESS, Handle: netlink.MakeHandle(0xffff, 0),
	}}
}

// filter is a u32 filter that compares nothing: matchall is missing from
// kernels that are otherwise fit.
func filter(link int) *netlink.U32 {
	return &netlink.U32{FilterAttrs: netlink.FilterAttrs{
		LinkIndex: link, Parent: netlink.HANDLE_MIN_INGRESS, Priority: filterPriority, Protocol: unix.ETH_P_ALL,
	}}
}

// makeWay removes from an interface's ingress hook what a virtual machine has
// left behind. What is in use by another one, or was made by somebody else,
// stays, and is an errdefs.ErrFailedPrecondition.
func makeWay(h *netlink.Handle, link int) error {
	found, err := findFilters(h, link)
	switch {
	case err != nil:
		return err
	case found.foreign:
		return fmt.Errorf("somebody else filters what it receives: %w", errdefs.ErrFailedPrecondition)
	case !found.ours:
		return nil
	}
	// A target that is gone is number 0.
	if l, err := h.LinkByIndex(found.target); err == nil && isOurTap(l) {
		return fmt.Errorf("another virtual machine is joined to it by %s: %w", l.Attrs().Name, errdefs.ErrFailedPrecondition)
	}
	return removeFilter(h, link)
}

// removeRedirect undoes redirect. What is not there, or belongs to others, is
// left as it is.
func removeRedirect(h *netlink.Handle, link int) error {
	if err := removeFilter(h, link); err != nil {
		return err
	}
	found, err := findFilters(h, link)
	if err != nil || found.foreign {
		return err
	}
	return removeHook(h, link)
}

// removeHook removes the ingress hook, unless it is a clsact: that has an
// egress side as well, and is never ours.
func removeHook(h *netlink.Handle, link int) error {
	qdiscs, err := dump(func() ([]netlink.Qdisc, error) { return h.QdiscList(linkAt(link)) })
	if gone(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list queueing disciplines: %w", err)
	}
	for _, q := range qdiscs {
		if q.Attrs().Parent != netlink.HANDLE_INGRESS || q.Type() != "ingress" {
			continue
		}
		if err := h.QdiscDel(ingress(link)); err != nil && !gone(err) {
			return fmt.Errorf("remove ingress hook: %w", err)
		}
	}
	return nil
}

// linkAt names an interface to netlink by its number.
func linkAt(link int) netlink.Link {
	return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: link}}
}

// removeFilter removes our filters, from the last on: until the redirect is
// gone no frame goes astray.
func removeFilter(h *netlink.Handle, link int) error {
	all := []netlink.Filter{filter(link)}
	for _, f := range passFilters(link, 0) {
		all = append(all, &netlink.U32{FilterAttrs: f.FilterAttrs})
	}
	for _, f := range all {
		err := h.FilterDel(f)
		if err != nil && !gone(err) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) { // EINVAL: there is no hook
			return fmt.Errorf("remove redirect: %w", err)
		}
	}
	return nil
}

// filters is what was found at an ingress hook.
type filters struct {
	ours, foreign bool
	// target is the number of the interface to which ours redirects, 0 for
	// one that is gone.
	target int
}

func findFilters(h *netlink.Handle, link int) (filters, error) {
	var found filters
	list, err := dump(func() ([]netlink.Filter, error) {
		return h.FilterList(linkAt(link), netlink.HANDLE_MIN_INGRESS)
	})
	if err != nil && !gone(err) && !errors.Is(err, unix.EINVAL) {
		return found, fmt.Errorf("list filters: %w", err)
	}
	for _, f := range list {
		u, isU32 := f.(*netlink.U32)
		if !isU32 || f.Attrs().Priority > filterPriority || f.Attrs().Priority < passARPPriority {
			found.foreign = true
			continue
		}
		found.ours = true
		for _, a := range u.Actions {
			if m, ok := a.(*netlink.MirredAction); ok {
				found.target = m.Ifindex
			}
		}
	}
	return found, nil
}
