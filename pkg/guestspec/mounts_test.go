package guestspec

import (
	"fmt"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/pkg/idmap"
)

func TestMounts(t *testing.T) {
	const share = "/run/vmrt/share/web/mounts/0"
	tests := []struct {
		name string
		in   specs.Mount
		want specs.Mount
		bind *Bind // Mount and Options are filled in.
	}{
		{"bind",
			specs.Mount{Destination: "/a", Type: "bind", Source: "/srv/a", Options: []string{"rbind", "ro", "nosuid", "nodev", "noexec"}},
			specs.Mount{Destination: "/a", Type: "bind", Source: share, Options: []string{"rbind", "ro", "nosuid", "nodev", "noexec"}},
			&Bind{Source: "/srv/a", Destination: "/a", ReadOnly: true, Recursive: true}},
		{"bind by option",
			specs.Mount{Destination: "/a", Type: "none", Source: "/srv/a", Options: []string{"bind", "ro", "rw"}},
			specs.Mount{Destination: "/a", Type: "bind", Source: share, Options: []string{"bind", "ro", "rw"}},
			&Bind{Source: "/srv/a", Destination: "/a"}},
		{"bind by type",
			specs.Mount{Destination: "/a", Type: "bind", Source: "/srv/a"},
			specs.Mount{Destination: "/a", Type: "bind", Source: share, Options: []string{"bind"}},
			&Bind{Source: "/srv/a", Destination: "/a"}},
		{"relative paths",
			specs.Mount{Destination: "a", Type: "bind", Source: "files/../a", Options: []string{"bind"}},
			specs.Mount{Destination: "/a", Type: "bind", Source: share, Options: []string{"bind"}},
			&Bind{Source: "/run/bundle/web/a", Destination: "/a"}},
		{"recursive read-only",
			specs.Mount{Destination: "/a", Type: "bind", Source: "/srv/a", Options: []string{"rbind", "rro"}},
			specs.Mount{Destination: "/a", Type: "bind", Source: share, Options: []string{"rbind", "rro"}},
			&Bind{Source: "/srv/a", Destination: "/a", ReadOnly: true, Recursive: true, RecursiveReadOnly: true}},
		{"recursive read-write last",
			specs.Mount{Destination: "/a", Type: "bind", Source: "/srv/a", Options: []string{"rbind", "rro", "rrw"}},
			specs.Mount{Destination: "/a", Type: "bind", Source: share, Options: []string{"rbind", "rro", "rrw"}},
			&Bind{Source: "/srv/a", Destination: "/a", Recursive: true}},
		{"slave",
			specs.Mount{Destination: "/a", Type: "bind", Source: "/srv/a", Options: []string{"rbind", "rslave"}},
			specs.Mount{Destination: "/a", Type: "bind", Source: share, Options: []string{"rbind", "rslave"}},
			&Bind{Source: "/srv/a", Destination: "/a", Recursive: true, Slave: true}},
		{"private after shared",
			specs.Mount{Destination: "/a", Type: "bind", Source: "/srv/a", Options: []string{"rbind", "shared", "private"}},
			specs.Mount{Destination: "/a", Type: "bind", Source: share, Options: []string{"rbind", "shared", "private"}},
			&Bind{Source: "/srv/a", Destination: "/a", Recursive: true}},
		{"inert options",
			specs.Mount{Destination: "/a", Type: "bind", Source: "/srv/a", Options: []string{"silent", "bind", "lazytime", "tmpcopyup"}},
			specs.Mount{Destination: "/a", Type: "bind", Source: share, Options: []string{"bind"}},
			&Bind{Source: "/srv/a", Destination: "/a"}},
		{"data below /dev/shm",
			specs.Mount{Destination: "/a", Type: "bind", Source: "/dev/shm/a", Options: []string{"bind"}},
			specs.Mount{Destination: "/a", Type: "bind", Source: share, Options: []string{"bind"}},
			&Bind{Source: "/dev/shm/a", Destination: "/a"}},
		{"a path that only looks like the kernel's",
			specs.Mount{Destination: "/a", Type: "bind", Source: "/system/a", Options: []string{"bind"}},
			specs.Mount{Destination: "/a", Type: "bind", Source: share, Options: []string{"bind"}},
			&Bind{Source: "/system/a", Destination: "/a"}},
		{"out of the kernel's",
			specs.Mount{Destination: "/a", Type: "bind", Source: "/proc/../etc/hosts", Options: []string{"bind"}},
			specs.Mount{Destination: "/a", Type: "bind", Source: share, Options: []string{"bind"}},
			&Bind{Source: "/etc/hosts", Destination: "/a"}},
		{"/dev of the guest",
			specs.Mount{Destination: "/dev", Type: "bind", Source: "/dev", Options: []string{"rbind", "rshared"}},
			specs.Mount{Destination: "/dev", Type: "bind", Source: "/dev", Options: []string{"rbind", "rshared"}}, nil},
		{"device of the guest",
			specs.Mount{Destination: "/dev/fuse", Type: "bind", Source: "/dev/fuse", Options: []string{"bind"}},
			specs.Mount{Destination: "/dev/fuse", Type: "bind", Source: "/dev/fuse", Options: []string{"bind"}}, nil},
		{"folder of devices of the guest",
			specs.Mount{Destination: "/dev/net", Type: "bind", Source: "/dev/net/", Options: []string{"rbind"}},
			specs.Mount{Destination: "/dev/net", Type: "bind", Source: "/dev/net", Options: []string{"rbind"}}, nil},
		{"/dev/shm of the guest",
			specs.Mount{Destination: "/dev/shm", Type: "bind", Source: "/dev/shm", Options: []string{"rbind"}},
			specs.Mount{Destination: "/dev/shm", Type: "bind", Source: "/dev/shm", Options: []string{"rbind"}}, nil},
		{"/sys/fs/cgroup of the guest",
			specs.Mount{Destination: "/sys/fs/cgroup", Type: "bind", Source: "/sys/fs/cgroup", Options: []string{"rbind", "ro"}},
			specs.Mount{Destination: "/sys/fs/cgroup", Type: "bind", Source: "/sys/fs/cgroup", Options: []string{"rbind", "ro"}}, nil},
		{"/proc of the guest",
			specs.Mount{Destination: "/host/proc", Type: "bind", Source: "/proc", Options: []string{"rbind"}},
			specs.Mount{Destination: "/host/proc", Type: "bind", Source: "/proc", Options: []string{"rbind"}}, nil},
		{"/proc/sys of the guest",
			specs.Mount{Destination: "/s", Type: "bind", Source: "/proc/sys/net", Options: []string{"rbind"}},
			specs.Mount{Destination: "/s", Type: "bind", Source: "/proc/sys/net", Options: []string{"rbind"}}, nil},
		{"tmpfs",
			specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"size=64m", "mode=1777", "noexec", "tmpcopyup"}},
			specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"size=64m", "mode=1777", "noexec", "tmpcopyup"}}, nil},
		{"shm with its size",
			specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"size=1g", "context=\"a:b:c:s0\""}},
			specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"size=1g"}}, nil},
		{"cgroup without options",
			specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup"},
			specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup"}, nil},
		{"a host path as label",
			specs.Mount{Destination: "/t", Type: "tmpfs", Source: "/srv/secret"},
			specs.Mount{Destination: "/t", Type: "tmpfs", Source: "tmpfs"}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			plan, err := rewrite(t, func(s *specs.Spec) { s.Mounts = append(s.Mounts, tt.in) })
			if err != nil {
				t.Fatal(err)
			}
			last := len(plan.Spec.Mounts) - 1
			if diff := cmp.Diff(tt.want, plan.Spec.Mounts[last]); diff != "" {
				t.Errorf("mount (-want +got):\n%s", diff)
			}
			var want []Bind
			if tt.bind != nil {
				tt.bind.Mount, tt.bind.Options = last, tt.in.Options
				want = []Bind{*tt.bind}
			}
			if diff := cmp.Diff(want, plan.Binds); diff != "" {
				t.Errorf("Plan.Binds (-want +got):\n%s", diff)
			}
		})
	}
}

func TestIDMappedMounts(t *testing.T) {
	own, other := extents("0:1000:65536"), extents("0:5000:1")
	s := ctrSpec(t)
	setIDs(s, "", "0:1000:65536")
	for _, m := range []specs.Mount{
		{Options: []string{"rbind"}},
		{Options: []string{"rbind", "idmap"}},
		{Options: []string{"rbind", "ridmap"}},
		{Options: []string{"rbind"}, UIDMappings: other, GIDMappings: other},
		{Options: []string{"ridmap", "rbind"}, UIDMappings: other, GIDMappings: other},
	} {
		m.Source, m.Destination = "/srv", "/a"
		s.Mounts = append(s.Mounts, m)
	}
	in := input(s)
	in.IDs = idmap.Mapping{UIDs: own, GIDs: own}
	plan, err := Rewrite(in)
	if err != nil {
		t.Fatal(err)
	}
	ours := plan.Binds[len(plan.Binds)-5:]
	for i, want := range []struct {
		ids       []specs.LinuxIDMapping
		recursive bool
	}{{nil, false}, {own, false}, {own, true}, {other, false}, {other, true}} {
		b := ours[i]
		if !slices.Equal(b.IDs.UIDs, want.ids) || !slices.Equal(b.IDs.GIDs, want.ids) || b.RecursiveIDs != want.recursive {
			t.Errorf("bind %d maps %v, recursively %v; want %v, %v", i, b.IDs, b.RecursiveIDs, want.ids, want.recursive)
		}
		if m := plan.Spec.Mounts[b.Mount]; m.UIDMappings != nil || slices.Contains(m.Options, "idmap") || slices.Contains(m.Options, "ridmap") {
			t.Errorf("mount %d of the guest is to be id-mapped once more: %+v", i, m)
		}
	}
}

func TestMountErrors(t *testing.T) {
	mapping := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	bind := func(source string, options ...string) specs.Mount {
		return specs.Mount{Destination: "/a", Type: "bind", Source: source, Options: append([]string{"rbind"}, options...)}
	}
	fs := func(typ, source string) specs.Mount {
		return specs.Mount{Destination: "/a", Type: typ, Source: source}
	}
	tests := []struct {
		name string
		in   specs.Mount
		kind error
		want string
	}{
		{"ext4", fs("ext4", "/dev/sdb1"), errdefs.ErrNotImplemented,
			"mount /dev/sdb1 at /a: file system type ext4 cannot be mounted in a virtual machine; mount it on the host and bind it"},
		{"nfs", fs("nfs", "server:/export"), errdefs.ErrNotImplemented,
			"mount server:/export at /a: file system type nfs cannot be mounted in a virtual machine; mount it on the host and bind it"},
		{"overlay", fs("overlay", "overlay"), errdefs.ErrNotImplemented,
			"mount overlay at /a: file system type overlay cannot be mounted in a virtual machine; mount it on the host and bind it"},
		{"no type", fs("", "/srv"), errdefs.ErrInvalidArgument, "mount /srv at /a: no type, nor bind among the options"},
		{"no source", bind(""), errdefs.ErrInvalidArgument, "mount at /a: no source"},
		{"no destination", specs.Mount{Type: "bind", Source: "/srv"}, errdefs.ErrInvalidArgument, "mount /srv: no destination"},
		{"rshared", bind("/srv", "rshared"), errdefs.ErrNotImplemented,
			"mount /srv at /a: option rshared: mounts made in a virtual machine cannot propagate to the host"},
		{"shared", bind("/srv", "shared"), errdefs.ErrNotImplemented,
			"mount /srv at /a: option shared: mounts made in a virtual machine cannot propagate to the host"},
		{"idmap without ids", bind("/srv", "idmap"), errdefs.ErrInvalidArgument,
			"mount /srv at /a: id-mapped mounts must have both uid and gid mappings specified"},
		{"uids alone", specs.Mount{Destination: "/a", Type: "bind", Source: "/srv", Options: []string{"bind"}, UIDMappings: mapping},
			errdefs.ErrInvalidArgument, "mount /srv at /a: id-mapped mounts must have both uid and gid mappings specified"},
		{"id-mapped tmpfs", specs.Mount{Destination: "/a", Type: "tmpfs", Source: "tmpfs", UIDMappings: mapping, GIDMappings: mapping},
			errdefs.ErrInvalidArgument, "mount tmpfs at /a: id-mapped mounts are only supported for bind-mounts"},
		{"id-mapped file of the guest", specs.Mount{Destination: "/a", Type: "bind", Source: "/proc/meminfo", UIDMappings: mapping, GIDMappings: mapping},
			errdefs.ErrNotImplemented, "mount /proc/meminfo at /a: the virtual machine's own files cannot be id-mapped"},
		{"nosymfollow", bind("/srv", "nosymfollow"), errdefs.ErrNotImplemented,
			"mount /srv at /a: option nosymfollow: not available in a virtual machine"},
		{"file system's option", bind("/srv", "size=1g", "uid=0"), errdefs.ErrInvalidArgument,
			"mount /srv at /a: bind mounts cannot have any filesystem-specific options applied: size=1g,uid=0"},
		{"namespace file", bind("/proc/42/ns/net"), errdefs.ErrNotImplemented,
			"mount /proc/42/ns/net at /a: not present in the virtual machine"},
		{"own process", bind("/proc/self/exe"), errdefs.ErrNotImplemented,
			"mount /proc/self/exe at /a: not present in the virtual machine"},
		{"absent device", bind("/dev/dri"), errdefs.ErrNotImplemented, "mount /dev/dri at /a: not present in the virtual machine"},
		{"disk of the host", bind("/dev/sda"), errdefs.ErrNotImplemented, "mount /dev/sda at /a: not present in the virtual machine"},
		{"socket below /dev", bind("/dev/log"), errdefs.ErrNotImplemented, "mount /dev/log at /a: not present in the virtual machine"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			plan, err := rewrite(t, func(s *specs.Spec) { s.Mounts = append(s.Mounts, tt.in) })
			checkError(t, plan, err, tt.kind, tt.want)
		})
	}
}

func TestHundredMounts(t *testing.T) {
	plan, err := rewrite(t, func(s *specs.Spec) {
		for i := range 100 {
			s.Mounts = append(s.Mounts, specs.Mount{
				Destination: fmt.Sprintf("/m/%d", i), Type: "bind", Source: fmt.Sprintf("/srv/%d", i), Options: []string{"bind"},
			})
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(plan.Binds) != 100 {
		t.Fatalf("len(Binds) = %d; want 100", len(plan.Binds))
	}
	for i, b := range plan.Binds {
		m := plan.Spec.Mounts[b.Mount]
		if b.Source != fmt.Sprintf("/srv/%d", i) || m.Destination != fmt.Sprintf("/m/%d", i) || m.Source != SharePath("web", i) {
			t.Errorf("bind %d = %+v, mounted as %+v", i, b, m)
		}
	}
}
