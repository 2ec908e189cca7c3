package conformance

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/guest/initramfs"
)

// guestFiles copies the tuned or else the stock guest, less one file, by links.
func guestFiles(t *testing.T, without string) (dir, kind string) {
	t.Helper()
	dir = t.TempDir()
	for _, kind = range []string{guest.Tuned, guest.Stock} {
		from := filepath.Join(shimDir(t), "guest", kind)
		if !exists(from) {
			continue
		}
		if err := os.Mkdir(filepath.Join(dir, kind), 0o755); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{guest.KernelFile, guest.InitramfsFile, guest.ManifestFile} {
			if name == without {
				continue
			}
			if err := os.Symlink(filepath.Join(from, name), filepath.Join(dir, kind, name)); err != nil {
				t.Fatal(err)
			}
		}
		return dir, kind
	}
	t.Skip("no guest files")
	return "", ""
}

// guestConfig names a folder of guest files in the configuration.
func guestConfig(dir, kind string) string {
	return fmt.Sprintf("guest_dir = %q\nkernel = %q\n", dir, kind)
}

// initOnly makes the initramfs in dir hold a program that never answers.
func initOnly(t *testing.T, dir, kind, script string) {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	var a initramfs.Archive
	var out bytes.Buffer
	for _, err := range []error{
		a.Dir("bin", 0o755), a.File("bin/sh", 0o755, b), a.File("init", 0o755, []byte("#!/bin/sh\n"+script+"\n")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.WriteTo(&out); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, kind, guest.InitramfsFile), out.String(), 0o644)
}

func TestGuestFileErrors(t *testing.T) {
	for _, tc := range []struct {
		name, without, script, config string
		want                          []string
		within                        time.Duration
	}{
		{"no kernel", guest.KernelFile, "", "", []string{guest.KernelFile + " is missing"}, 5 * time.Second},
		{"no initramfs", guest.InitramfsFile, "", "", []string{guest.InitramfsFile + " is missing"}, 5 * time.Second},
		{"silent agent", guest.InitramfsFile, "while :; do sleep 1; done", `boot_timeout = "4s"`, []string{"4s", "boot_timeout", "wait for agent"}, 15 * time.Second},
		{"init ends", guest.InitramfsFile, "exit 3", "", []string{"boot virtual machine", "panic"}, 25 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir, kind := guestFiles(t, tc.without)
			if tc.script != "" {
				initOnly(t, dir, kind, tc.script)
			}
			s := newShim(t, options{config: guestConfig(dir, kind) + tc.config})
			begin := time.Now()
			_, err := s.create(nil, false)
			if err == nil {
				t.Fatal("Create = nil; want an error")
			}
			if took := time.Since(begin); took > tc.within {
				t.Errorf("Create failed after %v; want within %v", took, tc.within)
			}
			for _, want := range tc.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("Create = %v; want %q in it", err, want)
				}
			}
		})
	}
}

// child waits for a process of the shim whose command's name begins so.
func (s *shim) child(name string) int {
	s.t.Helper()
	for deadline := time.Now().Add(callTimeout); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if pid := s.lookChild(name); pid != 0 {
			return pid
		}
	}
	s.t.Fatalf("no %s is running", name)
	return 0
}

// lookChild returns 0 when there is none.
func (s *shim) lookChild(name string) int {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		var pid, parent int
		var state string
		_, rest, _ := strings.Cut(string(b), "(")
		i := strings.LastIndex(rest, ")")
		if i < 0 || !strings.HasPrefix(rest, name) {
			continue
		}
		fmt.Sscan(string(b), &pid)
		fmt.Sscan(rest[i+1:], &state, &parent)
		if parent == s.pid() {
			return pid
		}
	}
	return 0
}

// pid returns the shim's.
func (s *shim) pid() int {
	s.t.Helper()
	c, err := s.task.Connect(s.call(), &taskapi.ConnectRequest{ID: s.id})
	if err != nil {
		s.t.Fatal(err)
	}
	return int(c.ShimPid)
}

func send(t *testing.T, pid int, signal syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, signal); err != nil {
		t.Fatal(err)
	}
}

// A machine or file server that dies during Create is Create's error.
func TestKilledDuringCreate(t *testing.T) {
	for _, tc := range []struct {
		victim string
		want   []string // one of them
	}{
		{"qemu-system", []string{"killed"}},
		// The VMM may not have spoken to it yet, and ends first.
		{"virtiofsd", []string{"file system daemon", "vhost-user-fs"}},
	} {
		t.Run(tc.victim, func(t *testing.T) {
			s := newShim(t, args("sleep", "1000"))
			s.pid() // before Create, which does not answer now
			failed := make(chan error, 1)
			go func() {
				_, err := s.create(nil, false)
				failed <- err
			}()
			// The VMM is started last.
			s.child("qemu-system")
			send(t, s.child(tc.victim), syscall.SIGKILL)
			err := <-failed
			if err == nil || !slices.ContainsFunc(tc.want, func(w string) bool { return strings.Contains(err.Error(), w) }) {
				t.Errorf("Create = %v; want an error with one of %q in it", err, tc.want)
			}
		})
	}
}

// Whatever dies, processes end with status 137, their streams end, and a
// request that is under way fails.
func TestKilledWithStreamsOpen(t *testing.T) {
	for _, victim := range []string{"qemu-system", "virtiofsd"} {
		t.Run(victim, func(t *testing.T) {
			s := newShim(t, args("cat"))
			st := newStreams(t, true, false)
			s.mustCreate(st, false)
			s.mustStart("")
			busy := newStreams(t, false, false)
			if err := s.addExec("busy", busy, false, "cat", "/dev/zero"); err != nil {
				t.Fatal(err)
			}
			s.mustStart("busy")
			busy.out.waitFor(t, strings.Repeat("\x00", 1<<20))
			for i := range 4 {
				if err := s.addExec(fmt.Sprint("starting", i), nil, false, "sleep", "1000"); err != nil {
					t.Fatal(err)
				}
			}
			var wg sync.WaitGroup
			for i := range 4 {
				wg.Add(1)
				go func() {
					defer wg.Done()
					// It may have started in time; what counts is an answer.
					s.task.Start(s.call(), &taskapi.StartRequest{ID: s.id, ExecID: fmt.Sprint("starting", i)})
				}()
			}
			send(t, s.child(victim), syscall.SIGKILL)
			for _, id := range []string{"", "busy"} {
				if got := s.wait(id); got != 137 {
					t.Errorf("exit status of %q = %d; want 137", id, got)
				}
			}
			waitFor(t, s.events, func(e *eventsapi.TaskExit) bool { return e.ID == s.id && e.ExitStatus == 137 })
			_, _ = st.out.String(), busy.out.String() // return when the streams have ended
			wg.Wait()
			for i := range 4 {
				id := fmt.Sprint("starting", i)
				if got := s.wait(id); got != 137 && got != 255 {
					t.Errorf("exit status of %q = %d; want 137, or 255 of one that did not start", id, got)
				}
			}
			if err := s.pause(); err == nil {
				t.Error("Pause in a dead virtual machine = nil; want an error")
			}
			if err := s.addExec("late", nil, false, "true"); err == nil {
				t.Error("Exec in a dead virtual machine = nil; want an error")
			}
			if d := s.delete(""); d.ExitStatus != 137 {
				t.Errorf("Delete = status %d; want 137", d.ExitStatus)
			}
		})
	}
}

// Nobody in the guest can kill its PID 1, but a container in the virtual
// machine's own pid namespace can make it end itself: SIGABRT has a handler.
func TestAgentKilled(t *testing.T) {
	s := newShim(t, options{spec: func(spec *specs.Spec) {
		sleeper(spec)
		privileged(spec)
		spec.Linux.Namespaces = without(spec.Linux.Namespaces, specs.PIDNamespace)
	}})
	s.mustCreate(nil, false)
	s.mustStart("")
	if err := s.addExec("abort", nil, false, "kill", "-ABRT", "1"); err != nil {
		t.Fatal(err)
	}
	s.task.Start(s.call(), &taskapi.StartRequest{ID: s.id, ExecID: "abort"}) // may be cut off
	if got := s.wait(""); got != 137 {
		t.Errorf("exit status = %d; want 137", got)
	}
	if !strings.Contains(s.log.String(), "virtual machine ended") {
		t.Error("the log does not say that the virtual machine ended")
	}
}

// A guest that hangs holds up what only it can answer, for a bounded time.
// What the host knows is answered, and SIGKILL works.
func TestHungGuest(t *testing.T) {
	s := newShim(t, args("sleep", "1000"))
	pid := s.mustCreate(nil, false)
	s.mustStart("")
	if err := s.addExec("e", nil, false, "sleep", "1000"); err != nil {
		t.Fatal(err)
	}
	s.mustStart("e")
	exited := make(chan uint32, 1)
	go func() {
		resp, _ := s.task.Wait(s.call(), &taskapi.WaitRequest{ID: s.id})
		exited <- resp.GetExitStatus()
	}()
	send(t, s.child("qemu-system"), syscall.SIGSTOP)
	begin := time.Now()
	checkState(t, s, task.Status_RUNNING)
	pids, err := s.task.Pids(s.call(), &taskapi.PidsRequest{ID: s.id})
	if err != nil || len(pids.Processes) != 1 || pids.Processes[0].Pid != pid {
		t.Errorf("Pids = %v, %v; want %d", pids, err, pid)
	}
	s.pid()
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("State, Pids and Connect took %v; want no wait for the guest", took)
	}
	// All at once, so that the test waits once.
	var wg sync.WaitGroup
	for _, r := range []request{stats, pause, update, kill("", syscall.SIGTERM, false), kill("e", syscall.SIGKILL, false)} {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := r.call(s); err == nil {
				t.Errorf("%s of a hung guest = nil; want an error", r.name)
			}
		}()
	}
	s.kill(syscall.SIGKILL, false)
	if got := <-exited; got != 137 {
		t.Errorf("exit status = %d; want 137", got)
	}
	if took := time.Since(begin); took > 20*time.Second {
		t.Errorf("SIGKILL took %v; want at most 20s", took)
	}
	wg.Wait()
	if got := s.wait("e"); got != 137 {
		t.Errorf("exit status of the exec = %d; want 137", got)
	}
	s.delete("")
}

// A shim that is killed at any moment of Create leaves what `shim delete` finds.
func TestShimKilledDuringCreate(t *testing.T) {
	for _, tc := range []struct {
		name string
		wait func(*shim)
	}{
		{"first folder", func(s *shim) {
			for !exists(filepath.Join(s.dir, "state", namespace, s.id)) {
				time.Sleep(time.Millisecond)
			}
		}},
		{"machine starts", func(s *shim) { s.child("qemu-system") }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newShim(t, args("sleep", "1000"))
			s.killed = true
			pid := s.pid()
			failed := make(chan error, 1)
			go func() {
				_, err := s.create(nil, false)
				failed <- err
			}()
			tc.wait(s)
			send(t, pid, syscall.SIGKILL)
			if err := <-failed; err == nil {
				t.Error("Create = nil; want an error")
			}
			s.waitGone(pid)
			// containerd runs one for each bundle, perhaps at once.
			var wg sync.WaitGroup
			for range 3 {
				wg.Add(1)
				go func() {
					defer wg.Done()
					ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
					defer cancel()
					s.runBinaryContext(ctx, nil, "delete")
				}()
			}
			wg.Wait()
		})
	}
}

func TestStateDirErrors(t *testing.T) {
	for _, tc := range []struct {
		name, options string
		flags         uintptr
		fill          bool
		want          string
	}{
		{"read-only", "", syscall.MS_RDONLY, false, "read-only file system"},
		{"no inodes", "nr_inodes=1", 0, false, "no space left on device"},
		{"full", "size=64k", 0, true, "no space left on device"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := syscall.Mount("tmpfs", dir, "tmpfs", tc.flags, tc.options); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := syscall.Unmount(dir, 0); err != nil {
					t.Errorf("the state folder is in use: %v", err)
					syscall.Unmount(dir, syscall.MNT_DETACH)
				}
			})
			if tc.fill {
				os.WriteFile(filepath.Join(dir, "fill"), make([]byte, 64<<10), 0o600)
			}
			s := newShim(t, options{})
			write(t, s.config, fmt.Sprintf("state_dir = %q\n", dir), 0o644)
			_, err := s.create(nil, false)
			if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), s.id) {
				t.Errorf("Create = %v; want an error about %s with %q in it", err, s.id, tc.want)
			}
			if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) > 1 || len(left) == 1 && !tc.fill {
				t.Errorf("state left behind: %v", left)
			}
		})
	}
}

func TestBundleErrors(t *testing.T) {
	config := func(content string) func(string) {
		return func(bundle string) {
			path := filepath.Join(bundle, "config.json")
			os.Remove(path)
			if content != "" {
				os.WriteFile(path, []byte(content), 0o644)
			}
		}
	}
	s := newShim(t, options{})
	for _, tc := range []struct{ name, content, want string }{
		{"none", "", "config.json not found"},
		{"empty", " ", "unexpected end of JSON input"},
		{"cut off", `{"ociVersion": "1.0.2", "process": {`, "unexpected end of JSON input"},
		{"wrong type", `{"process": 5}`, "cannot unmarshal number"},
		{"no process", `{"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "linux": {}}`, "process property must not be empty"},
		{"no rootfs", `{"ociVersion": "1.0.2", "process": {"args": ["sh"], "cwd": "/"}, "linux": {}}`, "root"},
		{"rootfs is missing", `{"ociVersion": "1.0.2", "process": {"args": ["sh"], "cwd": "/"}, "root": {"path": "none"}, "linux": {"namespaces": [{"type": "network"}, {"type": "mount"}]}}`, "none"},
		{"relative cwd", `{"ociVersion": "1.0.2", "process": {"args": ["sh"], "cwd": "x"}, "root": {"path": "rootfs"}, "linux": {"namespaces": [{"type": "network"}, {"type": "mount"}]}}`, "Cwd must be an absolute path"},
		{"no arguments", `{"ociVersion": "1.0.2", "process": {"args": [], "cwd": "/"}, "root": {"path": "rootfs"}, "linux": {"namespaces": [{"type": "network"}, {"type": "mount"}]}}`, "args must not be empty"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := s.add(t, options{bundle: config(tc.content)})
			begin := time.Now()
			_, err := c.create(nil, false)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Create = %v; want an error with %q in it", err, tc.want)
			}
			if took := time.Since(begin); took > 2*time.Second {
				t.Errorf("Create failed after %v; want within 2s", took)
			}
		})
	}
	t.Run("start", func(t *testing.T) {
		c := s.add(t, options{bundle: config("{")})
		cmd := exec.Command(filepath.Join(shimDir(t), "containerd-shim-vmrt-v2"), "-namespace", namespace, "-id", c.id, "-bundle", c.bundle, "start")
		cmd.Dir = c.bundle
		cmd.Stdin = bytes.NewReader(c.bootstrap(filepath.Join(s.dir, "events.sock"), t.TempDir()))
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), "config.json") {
			t.Errorf("shim start = %v, %s; want an error about config.json", err, out)
		}
	})
}
