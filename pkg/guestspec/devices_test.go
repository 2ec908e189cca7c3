package guestspec

import (
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/api"
)

func TestDevices(t *testing.T) {
	tests := []struct {
		name string
		in   specs.LinuxDevice
		want specs.LinuxDevice
	}{
		{"same",
			specs.LinuxDevice{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229, UID: ptr(uint32(7))},
			specs.LinuxDevice{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229, UID: ptr(uint32(7))}},
		{"under another name",
			specs.LinuxDevice{Path: "/dev/my-tun", Type: "u", Major: 10, Minor: 200},
			specs.LinuxDevice{Path: "/dev/my-tun", Type: "c", Major: 10, Minor: 200}},
		{"renumbered",
			specs.LinuxDevice{Path: "/dev/userfaultfd", Type: "c", Major: 10, Minor: 59},
			specs.LinuxDevice{Path: "/dev/userfaultfd", Type: "c", Major: 10, Minor: 126}},
		{"FIFO",
			specs.LinuxDevice{Path: "/dev/initctl", Type: "p"},
			specs.LinuxDevice{Path: "/dev/initctl", Type: "p"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rule := func(d specs.LinuxDevice) specs.LinuxDeviceCgroup {
				return specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: &d.Major, Minor: &d.Minor, Access: "rw"}
			}
			plan, err := rewrite(t, func(s *specs.Spec) {
				s.Linux.Devices = []specs.LinuxDevice{tt.in}
				s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, rule(tt.in))
			})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]specs.LinuxDevice{tt.want}, plan.Spec.Linux.Devices); diff != "" {
				t.Errorf("devices (-want +got):\n%s", diff)
			}
			rules := plan.Spec.Linux.Resources.Devices
			if diff := cmp.Diff(rule(tt.want), rules[len(rules)-1]); diff != "" {
				t.Errorf("device rule (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDeviceErrors(t *testing.T) {
	tests := []struct {
		name string
		in   specs.LinuxDevice
		kind error
		want string
	}{
		{"absent", specs.LinuxDevice{Path: "/dev/kvm", Type: "c", Major: 10, Minor: 232}, errdefs.ErrNotImplemented,
			"device /dev/kvm: not present in the virtual machine"},
		{"another disk of the same name", specs.LinuxDevice{Path: "/dev/sda", Type: "b", Major: 8}, errdefs.ErrNotImplemented,
			"device /dev/sda: not present in the virtual machine"},
		{"another serial line of the same name", specs.LinuxDevice{Path: "/dev/ttyS0", Type: "c", Major: 4, Minor: 64},
			errdefs.ErrNotImplemented, "device /dev/ttyS0: not present in the virtual machine"},
		{"another device of the same number", specs.LinuxDevice{Path: "/dev/x", Type: "c", Major: 10, Minor: 126},
			errdefs.ErrNotImplemented, "device /dev/x: not present in the virtual machine"},
		{"unknown type", specs.LinuxDevice{Path: "/dev/x", Type: "s"}, errdefs.ErrInvalidArgument, `invalid device type "s"`},
		{"no path", specs.LinuxDevice{Type: "c", Major: 1, Minor: 3}, errdefs.ErrInvalidArgument, "device c 1:3: no path"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			plan, err := rewrite(t, func(s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{tt.in} })
			checkError(t, plan, err, tt.kind, tt.want)
		})
	}
}

func TestIsPrivileged(t *testing.T) {
	all := specs.LinuxDeviceCgroup{Allow: true, Access: "rwm"}
	none := specs.LinuxDeviceCgroup{Access: "rwm"}
	one := specs.LinuxDeviceCgroup{Allow: true, Access: "rwm", Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(3))}
	for _, tt := range []struct {
		name  string
		rules []specs.LinuxDeviceCgroup
		caps  []string
		want  bool
	}{
		{"privileged", []specs.LinuxDeviceCgroup{all}, []string{"CAP_SYS_ADMIN"}, true},
		{"after a denial", []specs.LinuxDeviceCgroup{none, all}, []string{"CAP_SYS_ADMIN"}, true},
		{"and one more", []specs.LinuxDeviceCgroup{all, one}, []string{"CAP_SYS_ADMIN"}, true},
		{"denied last", []specs.LinuxDeviceCgroup{all, none}, []string{"CAP_SYS_ADMIN"}, false},
		{"one device", []specs.LinuxDeviceCgroup{none, one}, []string{"CAP_SYS_ADMIN"}, false},
		{"no capability", []specs.LinuxDeviceCgroup{all}, []string{"CAP_CHOWN"}, false},
		{"mknod only", []specs.LinuxDeviceCgroup{{Allow: true, Access: "m"}}, []string{"CAP_SYS_ADMIN"}, false},
		{"no rules", nil, []string{"CAP_SYS_ADMIN"}, false},
	} {
		s := ctrSpec(t)
		s.Process.Capabilities.Bounding = tt.caps
		s.Linux.Resources.Devices = tt.rules
		if got := isPrivileged(s); got != tt.want {
			t.Errorf("%s: isPrivileged() = %t; want %t", tt.name, got, tt.want)
		}
	}
}

// TestHostileGuestDevices lists what no honest agent lists.
func TestHostileGuestDevices(t *testing.T) {
	in := input(readSpec(t, "testdata/privileged.json"))
	in.Spec.Linux.Devices = nil
	in.GuestDevices = []*api.Device{
		nil, {}, {Path: "relative", Type: "c"}, {Path: "/etc/passwd", Type: "c"}, {Path: "/dev/x", Type: "??"},
		{Path: "/dev/ok", Type: "c", Major: 1, Minor: 1, Mode: 0xffffffff},
	}
	plan, err := Rewrite(in)
	if err != nil {
		t.Fatal(err)
	}
	if d := plan.Spec.Linux.Devices; len(d) != 1 || d[0].Path != "/dev/ok" || *d[0].FileMode != 0o777 {
		t.Errorf("devices = %+v; want /dev/ok alone, with permission bits only", d)
	}
}
