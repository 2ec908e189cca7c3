package sandbox

import (
	"net/netip"
	"testing"

	"github.com/vmrt/vmrt/api"
)

// A guest asks name servers that it was told of, and nobody else on the host.
func TestNameServersCheck(t *testing.T) {
	var n nameServers
	docker := netip.MustParseAddrPort("127.0.0.11:53")
	if err := n.check(api.UDP, docker); err == nil {
		t.Errorf("check(%s) before it was offered = nil; want an error", docker)
	}
	n.allow(docker.Addr())
	for _, network := range []string{api.UDP, api.TCP} {
		if err := n.check(network, docker); err != nil {
			t.Errorf("check(%s, %s) = %v; want nil", network, docker, err)
		}
		for _, other := range []string{"127.0.0.11:54", "127.0.0.1:53", "[::1]:53", "192.0.2.1:53"} {
			if err := n.check(network, netip.MustParseAddrPort(other)); err == nil {
				t.Errorf("check(%s, %s) = nil; want an error", network, other)
			}
		}
	}
}
