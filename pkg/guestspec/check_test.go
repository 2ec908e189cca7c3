package guestspec

import (
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/api"
)

// Check says what Rewrite says, or nothing.
func TestCheck(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*specs.Spec)
		want   bool // an error
	}{
		{"good", func(*specs.Spec) {}, false},
		{"no process", func(s *specs.Spec) { s.Process = nil }, true},
		{"no root", func(s *specs.Spec) { s.Root = nil }, true},
		{"no linux", func(s *specs.Spec) { s.Linux = nil }, true},
		{"host network", func(s *specs.Spec) { s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.MountNamespace}} }, false},
		{"sysctl of the host's network", func(s *specs.Spec) {
			s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.MountNamespace}}
			s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1"}
		}, true},
		{"propagation", func(s *specs.Spec) { s.Linux.RootfsPropagation = "odd" }, true},
		{"resources", func(s *specs.Spec) { s.Linux.Resources = &specs.LinuxResources{Unified: map[string]string{"x": "1"}} }, true},
		{"no resources", func(s *specs.Spec) { s.Linux.Resources = nil }, false},
		{"createContainer hook", func(s *specs.Spec) { s.Hooks = &specs.Hooks{CreateContainer: []specs.Hook{{Path: "/x"}}} }, true},
		{"relative hook", func(s *specs.Spec) { s.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "x"}}} }, true},
		// What the guest has is not known yet.
		{"device", func(s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/sda", Type: "b", Major: 8}} }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := &specs.Spec{
				Process: &specs.Process{Args: []string{"sh"}, Cwd: "/"}, Root: &specs.Root{Path: "rootfs"},
				Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.NetworkNamespace}}},
			}
			tt.change(s)
			in := Input{ID: "web", Bundle: "/bundle", Spec: s, GuestDevices: []*api.Device{}}
			err := Check(in)
			if (err != nil) != tt.want {
				t.Errorf("Check = %v; want an error: %t", err, tt.want)
			}
			if _, rewritten := Rewrite(in); err != nil && (rewritten == nil || rewritten.Error() != err.Error()) {
				t.Errorf("Check = %v; Rewrite = %v; want the same", err, rewritten)
			}
		})
	}
}
