package shim

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func TestNameServers(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	addrs := func(all ...string) (parsed []netip.Addr) {
		for _, a := range all {
			parsed = append(parsed, netip.MustParseAddr(a))
		}
		return parsed
	}
	for _, tt := range []struct {
		name, content, source, destination string
		want                               []netip.Addr
	}{
		{name: "Docker", content: "# made by Docker\nnameserver 127.0.0.11\noptions ndots:0\n", want: addrs("127.0.0.11")},
		{name: "several", content: "nameserver 192.0.2.1 # first\n\tnameserver\t2001:db8::1\nsearch nameserver\nnameserver 127.0.0.53", want: addrs("192.0.2.1", "2001:db8::1", "127.0.0.53")},
		{name: "no addresses", content: "nameserver\nnameserver here\n#nameserver 127.0.0.1\n"},
		{name: "endless", content: strings.Repeat("x", maxResolvConf) + "\nnameserver 127.0.0.1\n"},
		{name: "another file", content: "nameserver 127.0.0.11\n", destination: "/etc/hosts"},
		{name: "unclean path", content: "nameserver 127.0.0.11\n", destination: "/etc//resolv.conf", want: addrs("127.0.0.11")},
		{name: "missing", source: filepath.Join(dir, "missing")},
		{name: "FIFO", source: fifo},
		{name: "folder", source: dir},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.source == "" {
				tt.source = filepath.Join(t.TempDir(), "resolv.conf")
				if err := os.WriteFile(tt.source, []byte(tt.content), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if tt.destination == "" {
				tt.destination = "/etc/resolv.conf"
			}
			spec := &specs.Spec{Mounts: []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}, {Destination: tt.destination, Type: "bind", Source: tt.source}}}
			if diff := cmp.Diff(tt.want, nameServers(spec), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Errorf("nameServers() differs (-want +got):\n%s", diff)
			}
		})
	}
}
