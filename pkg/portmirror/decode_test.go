//go:build linux

package portmirror

import (
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/vmrt/vmrt/api"
)

// FuzzDecode: what a guest sends is refused, or is sockets that mean the same
// when they are sent on.
func FuzzDecode(f *testing.F) {
	for _, l := range []*api.ListeningPorts{
		{},
		{Ports: []*api.ListeningPort{{Address: []byte{127, 0, 0, 1}, Port: 80}, {Address: make([]byte, 16), Port: 443, V6Only: true}}},
		{Ports: []*api.ListeningPort{{Address: []byte{1}, Port: 1 << 20}}},
	} {
		b, err := proto.Marshal(l)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var list api.ListeningPorts
		if proto.Unmarshal(b, &list) != nil {
			return
		}
		sockets, err := decode(&list)
		if err != nil {
			return
		}
		if len(sockets) > api.MaxListeningPorts {
			t.Fatalf("decode() = %d sockets; want at most %d", len(sockets), api.MaxListeningPorts)
		}
		again, err := decode(encode(sockets))
		if err != nil || !slices.Equal(again, sockets) {
			t.Errorf("decode(encode(%v)) = %v, %v; want the same", sockets, again, err)
		}
	})
}
