package vsock_test

import (
	"net"
	"testing"

	"golang.org/x/net/nettest"

	"github.com/vmrt/vmrt/pkg/vhostuser/vsock"
	"github.com/vmrt/vmrt/pkg/vhostuser/vsock/vsocktest"
)

// Connections of both origins pass the tests of net.Conn, with drivers of
// several habits.
func TestConn(t *testing.T) {
	for _, tc := range []struct {
		name string
		cfg  vsock.Config
		gcfg vsocktest.Config
	}{
		{"plain", vsock.Config{}, vsocktest.Config{}},
		{"fragments", vsock.Config{}, vsocktest.Config{Fragments: 5}},
		{"indirect", vsock.Config{}, vsocktest.Config{Fragments: 3, Indirect: true}},
		{"without event index", vsock.Config{}, vsocktest.Config{WithoutEventIdx: true}},
		{"small buffers", vsock.Config{Buffer: 16 << 10}, vsocktest.Config{Credit: 1000, RxBuffers: 1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Run("from host", func(t *testing.T) {
				nettest.TestConn(t, func() (net.Conn, net.Conn, func(), error) {
					p := newPair(t, tc.cfg, tc.gcfg)
					host, guest := p.dialGuest(t)
					return host, guest, p.close, nil
				})
			})
			t.Run("from guest", func(t *testing.T) {
				nettest.TestConn(t, func() (net.Conn, net.Conn, func(), error) {
					p := newPair(t, tc.cfg, tc.gcfg)
					host, guest := p.dialHost(t)
					return host, guest, p.close, nil
				})
			})
		})
	}
}
