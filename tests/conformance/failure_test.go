package conformance

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
)

// What is missing or wrong is one clear error of Create, and nothing is left.
func TestCreateErrors(t *testing.T) {
	empty := t.TempDir()
	for _, tc := range []struct {
		name string
		o    options
		want []string
	}{
		{"unknown key", options{config: "no_such_key = 1"}, []string{"no_such_key"}},
		{"bad value", options{config: "memory_mib = -5"}, []string{"memory_mib"}},
		{"no qemu", options{config: `qemu = "/nonexistent/qemu"`}, []string{"/nonexistent/qemu", "no such file"}},
		{"no virtiofsd", options{config: `virtiofsd = "/nonexistent/virtiofsd"`}, []string{"/nonexistent/virtiofsd", "no such file"}},
		{"no guest files", options{config: fmt.Sprintf("guest_dir = %q", empty)}, []string{empty, "make build"}},
		{"missing mount source", options{spec: func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: "/nonexistent/source", Destination: "/mnt", Options: []string{"rbind"}})
		}}, []string{"/nonexistent/source", "no such file or directory"}},
		{"folder mounted at a file", options{spec: func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: empty, Destination: "/etc/passwd", Options: []string{"rbind"}})
		}}, []string{fmt.Sprintf("error mounting %q to rootfs at \"/etc/passwd\": not a directory", empty)}},
		{"no passt for the host's network", options{config: `passt = "/nonexistent/passt"`, spec: func(s *specs.Spec) {
			s.Linux.Namespaces = without(s.Linux.Namespaces, specs.NetworkNamespace)
		}}, []string{"the host's network needs passt: install the package passt", "/nonexistent/passt"}},
		{"sysctl of the host's network", options{spec: func(s *specs.Spec) {
			s.Linux.Namespaces = without(s.Linux.Namespaces, specs.NetworkNamespace)
			s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1"}
		}}, []string{`sysctl "net.ipv4.ip_forward" not allowed in host network namespace`}},
		{"missing device", options{spec: func(s *specs.Spec) {
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/nvme7", Type: "b", Major: 259, Minor: 7}}
		}}, []string{"/dev/nvme7"}},
		{"createContainer hook", options{spec: func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{CreateContainer: []specs.Hook{{Path: "/bin/true"}}}
		}}, []string{"createContainer", "/bin/true"}},
		{"failing hook", options{spec: func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "echo no luck >&2; exit 3"}}}}
		}}, []string{"createRuntime hook", "no luck"}},
		{"boot timeout", options{config: `boot_timeout = "1ms"`}, []string{"boot_timeout"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newShim(t, tc.o)
			_, err := s.create(nil, false)
			if err == nil {
				t.Fatal("Create = nil; want an error")
			}
			for _, want := range tc.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("Create = %v; want %q in it", err, want)
				}
			}
		})
	}
}

func without(all []specs.LinuxNamespace, drop specs.LinuxNamespaceType) []specs.LinuxNamespace {
	var kept []specs.LinuxNamespace
	for _, ns := range all {
		if ns.Type != drop {
			kept = append(kept, ns)
		}
	}
	return kept
}

// findVM returns the pid of the VMM of this shim's sandbox.
func (s *shim) findVM() int {
	s.t.Helper()
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		b, _ := os.ReadFile(p)
		if bytes.HasPrefix(filepathBase(b), []byte("qemu-system")) && bytes.Contains(b, []byte("vmrt-"+s.id)) {
			pid, _ := strconv.Atoi(strings.Split(p, "/")[2])
			return pid
		}
	}
	s.t.Fatal("no virtual machine is running")
	return 0
}

func filepathBase(cmdline []byte) []byte {
	arg, _, _ := bytes.Cut(cmdline, []byte{0})
	return arg[bytes.LastIndexByte(arg, '/')+1:]
}

// A virtual machine that is killed is one error in the log, which names it, and
// the end of its containers.
func TestVMKilled(t *testing.T) {
	s := newShim(t, args("sleep", "1000"))
	pid := s.mustCreate(nil, false)
	s.mustStart("")
	if err := syscall.Kill(s.findVM(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if got := s.wait(""); got != 137 {
		t.Errorf("exit status = %d; want 137", got)
	}
	waitFor(t, s.events, func(e *eventsapi.TaskExit) bool { return e.ID == s.id && e.Pid == pid && e.ExitStatus == 137 })
	var lines []string
	for line := range strings.Lines(s.log.String()) {
		if strings.Contains(line, "level=error") {
			lines = append(lines, line)
		}
	}
	if len(lines) != 1 || !strings.Contains(lines[0], "virtual machine ended") || !strings.Contains(lines[0], "vm vmrt-"+s.id) || !strings.Contains(lines[0], "signal: killed") {
		t.Errorf("errors in the log = %q; want one, of the machine and how it ended", lines)
	}
	if d := s.delete(""); d.ExitStatus != 137 {
		t.Errorf("Delete = status %d; want 137", d.ExitStatus)
	}
}

// A guest that restarts is a dead guest: the agent, its PID 1, is gone.
func TestGuestReboots(t *testing.T) {
	s := newShim(t, options{spec: func(spec *specs.Spec) {
		spec.Process.Args = []string{"sleep", "1000"}
		// In the virtual machine's own pid namespace reboot(2) means all of it.
		spec.Linux.Namespaces = without(spec.Linux.Namespaces, specs.PIDNamespace)
		spec.Process.Capabilities.Bounding = append(slices.Clone(caps), "CAP_SYS_BOOT")
		spec.Process.Capabilities.Effective = spec.Process.Capabilities.Bounding
		spec.Process.Capabilities.Permitted = spec.Process.Capabilities.Bounding
	}})
	s.mustCreate(nil, false)
	s.mustStart("")
	if err := s.addExec("crash", nil, false, "reboot", "-f"); err != nil {
		t.Fatal(err)
	}
	// Start may be cut off by what it starts.
	_, _ = s.task.Start(s.call(), &taskapi.StartRequest{ID: s.id, ExecID: "crash"})
	if got := s.wait(""); got != 137 {
		t.Errorf("exit status = %d; want 137", got)
	}
	// The kernel's last words are in the log, for who debugs.
	if !regexp.MustCompile(`level=debug msg="console: .*Restarting system`).MatchString(s.log.String()) {
		t.Error("the log lacks what the guest's kernel wrote to its console")
	}
}

// After a SIGKILL of the shim its children die, and `shim delete` removes the
// rest and says how the container ended.
func TestShimKilled(t *testing.T) {
	marker := filepath.Join(t.TempDir(), "poststop")
	s := newShim(t, options{spec: func(spec *specs.Spec) {
		spec.Process.Args = []string{"sleep", "1000"}
		spec.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "cat > " + marker}}}}
	}})
	pid := s.mustCreate(nil, false)
	s.mustStart("")
	s.killed = true
	vm := s.findVM()
	c, err := s.task.Connect(s.call(), &taskapi.ConnectRequest{ID: s.id})
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(int(c.ShimPid), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for _, p := range []int{int(c.ShimPid), vm, int(pid)} {
		s.waitGone(p)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for range 2 { // it is idempotent
		out := s.runBinaryContext(ctx, nil, "delete")
		var resp taskapi.DeleteResponse
		if err := proto.Unmarshal(out, &resp); err != nil || resp.ExitStatus != 137 {
			t.Errorf("shim delete = %v, %v; want status 137", &resp, err)
		}
	}
	if _, err := os.Stat(s.socket); !os.IsNotExist(err) {
		t.Errorf("the shim's socket after shim delete: %v; want it gone", err)
	}
	if b, err := os.ReadFile(marker); err != nil || !bytes.Contains(b, []byte(s.id)) {
		t.Errorf("poststop hook got %q, %v; want the state of %s", b, err, s.id)
	}
}
