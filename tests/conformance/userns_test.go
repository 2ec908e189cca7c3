package conformance

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// userNamespace gives a container one whose root is base outside.
func userNamespace(base uint32) func(*specs.Spec) {
	return func(s *specs.Spec) {
		ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: base, Size: 65536}}
		s.Linux.UIDMappings, s.Linux.GIDMappings = ids, ids
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	}
}

// inUserNamespace is a container whose root file system is the namespace's root's.
func inUserNamespace(base uint32, change func(*specs.Spec)) options {
	return options{
		spec: func(spec *specs.Spec) {
			userNamespace(base)(spec)
			change(spec)
		},
		rootfs: func(dir string) {
			filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
				return errors.Join(err, os.Lchown(path, int(base), int(base)))
			})
		},
	}
}

// TestUserNamespace is what tests/containerd and tests/cri do not compare with
// runc, since it would need udev or cgroup v2 of this machine.
func TestUserNamespace(t *testing.T) {
	const base = 100000
	s := newShim(t, inUserNamespace(base, sleeper))
	s.launch()

	st := newStreams(t, true, true)
	if err := s.addExec("tty", st, true, "sh", "-c", "read x; echo $x | tr a-z A-Z; tty; id -u; stat -c %u $(tty); echo reopened > $(tty); exit 7"); err != nil {
		t.Fatal(err)
	}
	s.mustStart("tty")
	st.in.WriteString("typed\n")
	for _, want := range []string{"TYPED", "/dev/pts/0", "reopened"} {
		st.out.waitFor(t, want)
	}
	if status := s.wait("tty"); status != 7 {
		t.Errorf("exec with a terminal exits with %d; want 7", status)
	}
	if got := strings.Fields(st.out.text()); len(got) < 2 || got[len(got)-2] != "0" || got[len(got)-3] != "0" {
		t.Errorf("terminal = %q; want it root's, and used by root", got)
	}

	t.Run("devices", func(t *testing.T) {
		c := s.add(t, inUserNamespace(base, func(spec *specs.Spec) {
			for _, d := range []specs.LinuxDevice{{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}, {Path: "/dev/net/tun", Type: "c", Major: 10, Minor: 200}} {
				spec.Linux.Devices = append(spec.Linux.Devices, d)
				spec.Linux.Resources.Devices = append(spec.Linux.Resources.Devices,
					specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: ptr(d.Major), Minor: ptr(d.Minor), Access: "rwm"})
			}
			// A FUSE descriptor that is not mounted cannot be read, nor one of tun
			// that has no interface.
			spec.Process.Args = []string{"sh", "-c", "cat 2>&1 < /dev/fuse | grep -o 'Operation not permitted'; cat 2>&1 < /dev/net/tun | grep -o 'File descriptor.*'; cat 2>&1 < /dev/null && echo null"}
		}))
		if out, errs, _ := c.run(); out != lines("Operation not permitted", "File descriptor in bad state", "null") {
			t.Errorf("devices say %q, %q; want that they were opened", out, errs)
		}
	})
	t.Run("cgroup", func(t *testing.T) {
		c := s.add(t, inUserNamespace(base, func(spec *specs.Spec) {
			for i, m := range spec.Mounts {
				if m.Type == "cgroup" {
					spec.Mounts[i].Options = []string{"rw", "nosuid", "noexec", "nodev"}
				}
			}
			spec.Process.Args = []string{"sh", "-c", "mkdir /sys/fs/cgroup/mine && echo $$ > /sys/fs/cgroup/mine/cgroup.procs && cat /proc/self/cgroup"}
		}))
		if out, errs, status := c.run(); out != lines("0::/mine") || status != 0 {
			t.Errorf("group of its own = %q, %q, status %d; want 0::/mine", out, errs, status)
		}
	})
	t.Run("neighbour without", func(t *testing.T) {
		c := s.add(t, options{spec: func(spec *specs.Spec) {
			spec.Process.Args = []string{"sh", "-c", "echo $(cat /proc/self/uid_map); touch /x && stat -c %u /x"}
		}})
		if out, errs, _ := c.run(); out != lines("0 0 4294967295", "0") {
			t.Errorf("container without a user namespace says %q, %q; want the ids of the machine", out, errs)
		}
	})
	t.Run("neighbour with other ids", func(t *testing.T) {
		c := s.add(t, options{spec: userNamespace(base + 1)})
		_, err := c.create(nil, false)
		want := fmt.Sprintf("user namespace of uids 0:%d:65536", base+1)
		if !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) || !strings.Contains(err.Error(), want) {
			t.Errorf("container with other ids = %v; want a failed precondition with %q", err, want)
		}
	})
	s.discard()
}

// TestPauseIsEmpty: who shares the pod's pid namespace finds nothing in its first
// process, whatever may be looked at.
func TestPauseIsEmpty(t *testing.T) {
	p := newPodsandbox(t, nil)
	c := p.container(func(spec *specs.Spec) {
		privileged(spec)
		setPID(spec, p.pid)
	})
	c.launch()
	defer c.discard()
	if got := c.out("cat /proc/1/cmdline | tr '\\0' ' '; ls -A /proc/1/root /proc/1/root/../.. /proc/1/cwd; grep -c . /proc/1/mountinfo; grep CapEff /proc/1/status"); got !=
		"/pause /proc/1/cwd:\n\n/proc/1/root:\n\n/proc/1/root/../..:\n1\nCapEff:\t0000000000000000" {
		t.Errorf("first process of the pod has %q; want nothing", got)
	}
}
