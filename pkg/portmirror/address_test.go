//go:build linux

package portmirror_test

import "github.com/vishvananda/netlink"

// addAddress gives the loopback interface of the calling thread's network
// namespace one more address.
func addAddress(prefix string) error {
	addr, err := netlink.ParseAddr(prefix)
	if err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.AddrAdd(lo, addr)
}
