package sandbox

import (
	"net/netip"
	"testing"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/hostnet"
	"github.com/vmrt/vmrt/pkg/portmirror"
)

// An address of the host that the guest does not have must not be dialled
// there: it would lead to the host, and so to the guest again, without end.
func TestGuestAddress(t *testing.T) {
	both := hostnet.Template{IPv4: netip.MustParsePrefix("192.0.2.2/24"), IPv6: netip.MustParsePrefix("2001:db8::2/64")}
	for _, tc := range []struct {
		template hostnet.Template
		to, want string
	}{
		{both, "127.0.0.1:80", "127.0.0.1:80"},
		{both, "127.0.0.53:80", "127.0.0.53:80"},
		{both, "[::1]:80", "[::1]:80"},
		{both, "192.0.2.2:80", "192.0.2.2:80"},
		{both, "[2001:db8::2]:80", "[2001:db8::2]:80"},
		{both, "10.88.0.1:80", "192.0.2.2:80"},
		{both, "[fe80::1]:80", "[2001:db8::2]:80"},
		{hostnet.Template{}, "10.88.0.1:80", "127.0.0.1:80"},
		{hostnet.Template{}, "[2001:db8::2]:80", "[::1]:80"},
	} {
		h := &hostNetwork{template: &tc.template}
		if got := h.guestAddress(netip.MustParseAddrPort(tc.to)); got.String() != tc.want {
			t.Errorf("guestAddress(%s) = %s; want %s", tc.to, got, tc.want)
		}
	}
}

// A guest reaches nothing on the host that it was not told of.
func TestAllowNothing(t *testing.T) {
	h := &hostNetwork{template: &hostnet.Template{IPv4: netip.MustParsePrefix("192.0.2.2/24")}, ports: portmirror.New(portmirror.Config{})}
	for _, to := range []string{"127.0.0.1:22", "192.0.2.2:22", "198.51.100.1:22"} {
		if err := h.allow(api.TCP, netip.MustParseAddrPort(to)); err == nil {
			t.Errorf("allow(%s) before anything was offered = nil; want an error", to)
		}
	}
}
