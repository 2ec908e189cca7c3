package guestspec

import (
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/idmap"
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
		{"user by path alone", byPath("user"), errdefs.ErrNotImplemented, "user" + outside},
		{"user without ids", func(s *specs.Spec) { setNamespace(s, "user", ptr("")) }, errdefs.ErrInvalidArgument,
			"user namespaces enabled, but no namespace path to join nor mappings to apply specified"},
		{"user without gids", func(s *specs.Spec) {
			setNamespace(s, "user", ptr(""))
			s.Linux.UIDMappings = extents("0:1000:10")
		}, errdefs.ErrInvalidArgument, "user namespaces enabled, but no gid mappings found"},
		{"user without a root", func(s *specs.Spec) { setIDs(s, "", "1:1000:10") }, errdefs.ErrInvalidArgument,
			"container uid 0 is not mapped"},
		{"ids alone", func(s *specs.Spec) { s.Linux.UIDMappings = extents("0:1000:10") }, errdefs.ErrInvalidArgument,
			"user namespace mappings specified, but user namespace isn't enabled in the config"},
		{"user that the machine has not", func(s *specs.Spec) { setIDs(s, "", "0:1000:10") }, errdefs.ErrNotImplemented,
			"user namespace: the first container of the virtual machine must have it"},
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
}

func extents(text string) []specs.LinuxIDMapping {
	list, err := idmap.Parse(text)
	if err != nil {
		panic(err)
	}
	return list
}

// setIDs gives the spec a user namespace.
func setIDs(s *specs.Spec, path, ids string) {
	setNamespace(s, "user", &path)
	s.Linux.UIDMappings, s.Linux.GIDMappings = extents(ids), extents(ids)
}

// TestUserNamespace: whatever its path, it is the virtual machine's.
func TestUserNamespace(t *testing.T) {
	const ids = "0:1000:65536"
	for _, path := range []string{"", "/run/pinned/user", "/proc/42/ns/user"} {
		s := ctrSpec(t)
		setIDs(s, path, ids)
		in := input(s)
		in.IDs = idmap.Mapping{UIDs: extents(ids), GIDs: extents(ids)}
		plan, err := Rewrite(in)
		if err != nil {
			t.Fatalf("path %q: %v", path, err)
		}
		want := specs.LinuxNamespace{Type: "user", Path: api.PodNamespaces + "/user"}
		l := plan.Spec.Linux
		if !slices.Contains(l.Namespaces, want) || idmap.Format(l.UIDMappings) != ids || idmap.Format(l.GIDMappings) != ids {
			t.Errorf("path %q: guest has namespaces %v and ids %v %v; want %v and %s", path, l.Namespaces, l.UIDMappings, l.GIDMappings, want, ids)
		}
		in.IDs.GIDs = extents("0:2000:65536")
		_, err = Rewrite(in)
		checkError(t, nil, err, errdefs.ErrNotImplemented, "user namespace of uids 0:1000:65536 and gids 0:1000:65536: "+
			"that of the virtual machine has 0:1000:65536 and 0:2000:65536")
	}
	// A neighbour that has none.
	in := input(ctrSpec(t))
	in.IDs = idmap.Mapping{UIDs: extents(ids), GIDs: extents(ids)}
	if _, err := Rewrite(in); err != nil {
		t.Errorf("container without a user namespace in a machine that has one: %v", err)
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
