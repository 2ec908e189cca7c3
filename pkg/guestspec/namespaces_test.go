package guestspec

import (
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// setNamespace replaces, adds or, with a nil path, removes a namespace.
func setNamespace(s *specs.Spec, typ specs.LinuxNamespaceType, path *string) {
	var out []specs.LinuxNamespace
	for _, ns := range s.Linux.Namespaces {
		if ns.Type != typ {
			out = append(out, ns)
		}
	}
	if path != nil {
		out = append(out, specs.LinuxNamespace{Type: typ, Path: *path})
	}
	s.Linux.Namespaces = out
}

func ptr[T any](v T) *T { return &v }

func TestNamespaces(t *testing.T) {
	tests := []struct {
		name   string
		change func(*specs.Spec)
		want   []specs.LinuxNamespace
		netNS  string
	}{
		{"all new", nil, []specs.LinuxNamespace{
			{Type: "pid"}, {Type: "ipc"}, {Type: "uts"}, {Type: "mount"}, {Type: "network", Path: "/proc/1/ns/net"},
			{Type: "cgroup"},
		}, ""},
		{"the virtual machine's own", func(s *specs.Spec) {
			for _, typ := range []specs.LinuxNamespaceType{"pid", "ipc", "uts"} {
				setNamespace(s, typ, nil)
			}
			s.Hostname = ""
		}, []specs.LinuxNamespace{{Type: "mount"}, {Type: "network", Path: "/proc/1/ns/net"}, {Type: "cgroup"}}, ""},
		{"network by path, cgroup and time", func(s *specs.Spec) {
			setNamespace(s, "network", ptr("/var/run/netns/cni-1"))
			setNamespace(s, "cgroup", ptr(""))
			setNamespace(s, "time", ptr(""))
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 1}}
		}, []specs.LinuxNamespace{
			{Type: "pid"}, {Type: "ipc"}, {Type: "uts"}, {Type: "mount"}, {Type: "network", Path: "/proc/1/ns/net"},
			{Type: "cgroup"}, {Type: "time"},
		}, "/var/run/netns/cni-1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			plan, err := rewrite(t, tt.change)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, plan.Spec.Linux.Namespaces); diff != "" {
				t.Errorf("namespaces (-want +got):\n%s", diff)
			}
			if plan.NetNS != tt.netNS {
				t.Errorf("NetNS = %q; want %q", plan.NetNS, tt.netNS)
			}
		})
	}
}

func TestNamespaceErrors(t *testing.T) {
	byPath := func(typ specs.LinuxNamespaceType) func(*specs.Spec) {
		return func(s *specs.Spec) { setNamespace(s, typ, ptr("/proc/42/ns/x")) }
	}
	const outside = " namespace /proc/42/ns/x: a namespace outside the virtual machine cannot be joined"
	tests := []struct {
		name   string
		change func(*specs.Spec)
		kind   error
		want   string
	}{
		{"net sysctl in the host's network", func(s *specs.Spec) {
			setNamespace(s, "network", nil)
			s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1", "kernel.msgmax": "1"}
		}, errdefs.ErrInvalidArgument, `sysctl "net.ipv4.ip_forward" not allowed in host network namespace`},
		{"net sysctl by path", func(s *specs.Spec) {
			setNamespace(s, "network", nil)
			s.Linux.Sysctl = map[string]string{"net/ipv4/ip_forward": "1"}
		}, errdefs.ErrInvalidArgument, `sysctl "net/ipv4/ip_forward" not allowed in host network namespace`},
		{"pid by path", byPath("pid"), errdefs.ErrNotImplemented, "pid" + outside},
		{"ipc by path", byPath("ipc"), errdefs.ErrNotImplemented, "ipc" + outside},
		{"uts by path", byPath("uts"), errdefs.ErrNotImplemented, "uts" + outside},
		{"cgroup by path", byPath("cgroup"), errdefs.ErrNotImplemented, "cgroup" + outside},
		{"time by path", byPath("time"), errdefs.ErrNotImplemented, "time" + outside},
		{"mount by path", byPath("mount"), errdefs.ErrNotImplemented, "mount" + outside},
		{"user by path", byPath("user"), ErrUserNamespace,
			"user namespace: user namespaces are not available in a virtual machine"},
		{"new user", func(s *specs.Spec) { setNamespace(s, "user", ptr("")) }, ErrUserNamespace,
			"user namespace: user namespaces are not available in a virtual machine"},
		{"mappings alone", func(s *specs.Spec) { s.Linux.UIDMappings = []specs.LinuxIDMapping{{Size: 1}} }, ErrUserNamespace,
			"uid and gid mappings: user namespaces are not available in a virtual machine"},
		{"no mount", func(s *specs.Spec) { setNamespace(s, "mount", nil) }, errdefs.ErrInvalidArgument,
			"mount namespace: a container in a virtual machine needs one of its own"},
		{"twice", func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: "pid"})
		}, errdefs.ErrInvalidArgument, `malformed spec file: duplicated ns "pid"`},
		{"unknown", func(s *specs.Spec) { setNamespace(s, "sound", ptr("")) }, errdefs.ErrInvalidArgument,
			`namespace "sound" does not exist`},
		{"hostname without uts", func(s *specs.Spec) { setNamespace(s, "uts", nil) }, errdefs.ErrInvalidArgument,
			"unable to set hostname without a private UTS namespace"},
		{"domainname without uts", func(s *specs.Spec) {
			setNamespace(s, "uts", nil)
			s.Hostname, s.Domainname = "", "example.org"
		}, errdefs.ErrInvalidArgument, "unable to set domainname without a private UTS namespace"},
		{"offsets without time", func(s *specs.Spec) {
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 1}}
		}, errdefs.ErrInvalidArgument, "time namespace offsets specified, but time namespace isn't enabled in the config"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			plan, err := rewrite(t, tt.change)
			checkError(t, plan, err, tt.kind, tt.want)
		})
	}
	if !errdefs.IsNotImplemented(ErrUserNamespace) {
		t.Errorf("%v is not of kind not implemented", ErrUserNamespace)
	}
}

func TestPodNamespaces(t *testing.T) {
	s := ctrSpec(t)
	setNamespace(s, "ipc", ptr("/proc/42/ns/ipc"))
	setNamespace(s, "uts", ptr("/proc/42/ns/uts"))
	setNamespace(s, "network", ptr("/var/run/netns/cni-1"))
	in := input(s)
	in.PodNamespaces = map[string]string{
		"/proc/42/ns/ipc":      "/run/vmrt/ns/ipc",
		"/proc/42/ns/uts":      "/run/vmrt/ns/uts",
		"/var/run/netns/cni-1": "/run/vmrt/ns/net",
	}
	plan, err := Rewrite(in)
	if err != nil {
		t.Fatal(err)
	}
	want := []specs.LinuxNamespace{
		{Type: "pid"}, {Type: "mount"}, {Type: "ipc", Path: "/run/vmrt/ns/ipc"}, {Type: "uts", Path: "/run/vmrt/ns/uts"},
		{Type: "network", Path: "/proc/1/ns/net"}, {Type: "cgroup"},
	}
	if diff := cmp.Diff(want, plan.Spec.Linux.Namespaces); diff != "" {
		t.Errorf("namespaces (-want +got):\n%s", diff)
	}
}
