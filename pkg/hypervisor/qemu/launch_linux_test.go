package qemu_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/hypervisor/qemu"
)

// imageFiles returns a kernel and an initrd for fakes.
func imageFiles(t *testing.T) (kernel, initrd string) {
	t.Helper()
	dir := t.TempDir()
	kernel, initrd = filepath.Join(dir, "vmlinux"), filepath.Join(dir, "initrd")
	for _, p := range []string{kernel, initrd} {
		if err := os.WriteFile(p, []byte("\x7fELF, content of "+filepath.Base(p)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return kernel, initrd
}

func fakeSpec(t *testing.T) hypervisor.Spec {
	kernel, initrd := imageFiles(t)
	return testSpec(t, kernel, initrd)
}

// launchFake starts a fake QEMU.
func launchFake(t *testing.T, behaviour string, cfg qemu.Config) hypervisor.VM {
	t.Helper()
	cfg.Binary = fakeBinary(t, behaviour)
	return launch(t, cfg, fakeSpec(t))
}

func waitDone(t *testing.T, vm hypervisor.VM) {
	t.Helper()
	select {
	case <-vm.Done():
	case <-time.After(20 * time.Second):
		t.Fatal("the machine is not done")
	}
}

func TestErr(t *testing.T) {
	tests := map[string]struct {
		want    string // a regular expression
		stopped bool
	}{
		"fail":           {want: `^vm test: qemu-fake: exit status 1: qemu-fake: a warning \| qemu-fake: could not load \[1mkernel\[0m '/.*/vmlinux'$`},
		"silent-failure": {want: `^vm test: qemu-fake: exit status 3$`},
		"much-stderr":    {want: `: exit status 1: .*line 299 x+ \| x+$`},
		"poweroff":       {want: `^vm test: the guest stopped: it powered off$`, stopped: true},
		"panic":          {want: `^vm test: the guest stopped: it reset; console: Kernel panic - not syncing: no reason$`, stopped: true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			vm := launchFake(t, name, qemu.Config{})
			waitDone(t, vm)
			err := vm.Err()
			if err == nil || !regexp.MustCompile(tt.want).MatchString(err.Error()) {
				t.Errorf("Err() = %v; want a match of %q", err, tt.want)
			}
			if got := errors.Is(err, hypervisor.ErrGuestStopped); got != tt.stopped {
				t.Errorf("errors.Is(Err(), ErrGuestStopped) = %v; want %v", got, tt.stopped)
			}
			if err != nil && len(err.Error()) > 40*1024 {
				t.Errorf("Err() is %d bytes long", len(err.Error()))
			}
			// Too late to be the reason.
			kill(t, vm)
			if after := vm.Err(); after != err {
				t.Errorf("Err() after Kill = %v; want %v", after, err)
			}
		})
	}
}

func TestKill(t *testing.T) {
	vm := launchFake(t, "linger", qemu.Config{})
	if err := vm.Err(); err != nil {
		t.Errorf("Err() of a running machine = %v", err)
	}
	if err := syscall.Kill(vm.Pid(), 0); err != nil {
		t.Errorf("kill(%d, 0) = %v; want a live process", vm.Pid(), err)
	}
	killed := make(chan struct{})
	for range 4 {
		go func() { kill(t, vm); killed <- struct{}{} }()
	}
	for range 4 {
		<-killed
	}
	waitDone(t, vm)
	kill(t, vm)
	if err := vm.Err(); err != nil {
		t.Errorf("Err() after Kill = %v; want nil", err)
	}
	if err := syscall.Kill(vm.Pid(), 0); err != syscall.ESRCH {
		t.Errorf("kill(%d, 0) after Kill = %v; want ESRCH: reaped", vm.Pid(), err)
	}
}

func TestKillEndsWithItsContext(t *testing.T) {
	// A console callback that does not return holds the machine's end up.
	entered, release := make(chan struct{}, 100), make(chan struct{})
	vm := launchFake(t, "console", qemu.Config{Console: func(string) { entered <- struct{}{}; <-release }})
	<-entered
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if err := vm.Kill(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Kill() = %v; want a deadline error", err)
	}
	close(release)
	waitDone(t, vm)
}

func TestKilledByOthers(t *testing.T) {
	vm := launchFake(t, "linger", qemu.Config{})
	if err := syscall.Kill(vm.Pid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitDone(t, vm)
	if err, want := vm.Err(), "vm test: qemu-fake: signal: killed"; err == nil || err.Error() != want {
		t.Errorf("Err() = %v; want %q", err, want)
	}
}

func TestConsole(t *testing.T) {
	c := newConsole(t)
	vm := launchFake(t, "console", qemu.Config{Console: c.line})
	c.wait(vm, strings.Repeat("y", 1300-2*512))
	kill(t, vm)
	want := []string{"one", "[31mtwo[0m", "? three four", strings.Repeat("y", 512), strings.Repeat("y", 512),
		strings.Repeat("y", 1300-2*512), "last without an end"}
	if diff := cmp.Diff(want, vm.(*qemu.VM).ConsoleTail()); diff != "" {
		t.Errorf("ConsoleTail() (-want +got):\n%s", diff)
	}
	var got []string
	for _, l := range strings.Split(c.all(), "\n") {
		got = append(got, l[strings.Index(l, "] ")+2:])
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("lines on the callback (-want +got):\n%s", diff)
	}
}

// TestConsoleFlood: a guest that floods its console is read at a bounded rate,
// and can be killed.
func TestConsoleFlood(t *testing.T) {
	var bytes int
	start := time.Now()
	vm := launchFake(t, "flood", qemu.Config{Console: func(l string) { bytes += len(l) }})
	time.Sleep(500 * time.Millisecond) // what is measured
	kill(t, vm)
	elapsed := time.Since(start)
	if limit := int(400<<10*elapsed.Seconds()) + 1<<20; bytes == 0 || bytes > limit {
		t.Errorf("read %d bytes in %v; want some, at most %d", bytes, elapsed, limit)
	}
}

// TestOrphanHoldsPipes: the machine's end does not wait for a process that
// inherited QEMU's stderr.
func TestOrphanHoldsPipes(t *testing.T) {
	start := time.Now()
	vm := launchFake(t, "orphan", qemu.Config{})
	waitDone(t, vm)
	if d := time.Since(start); d > 10*time.Second {
		t.Errorf("the machine was done after %v", d)
	}
	m := regexp.MustCompile(`orphan (\d+)`).FindStringSubmatch(fmt.Sprint(vm.Err()))
	if m == nil {
		t.Fatalf("Err() = %v; want the orphan's pid", vm.Err())
	}
	pid, _ := strconv.Atoi(m[1])
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Errorf("kill the orphan: %v", err)
	}
}

func TestQMP(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	vm := launchFake(t, "bad-qmp", qemu.Config{})
	if _, err := vm.(*qemu.VM).QMP(ctx); err == nil || !strings.HasPrefix(err.Error(), "vm test: qmp greeting: malformed message") {
		t.Errorf("QMP() = %v; want a malformed greeting", err)
	}
	silent := launchFake(t, "linger", qemu.Config{})
	short, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := silent.(*qemu.VM).QMP(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("QMP() = %v; want a deadline error", err)
	}
}

// TestInheritance checks the files, the user and the environment that QEMU
// gets, with images below a folder that its user cannot enter.
func TestInheritance(t *testing.T) {
	c := newConsole(t)
	cfg := qemu.Config{Console: c.line, Binary: fakeBinary(t, "files")}
	spec := fakeSpec(t)
	// Somebody's descriptor that is not close-on-exec.
	stray, err := unix.Dup(int(spec.Vsock.Backend.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(stray)
	want := []string{
		"-kernel ELF, content of vmlinux", "-initrd ELF, content of initrd", "LC_ALL=C HOME= in /",
		// Standard ones, kernel, initrd, console, QMP, vsock.
		"inherited [0 1 2 3 4 5 6 7]",
	}
	if os.Geteuid() == 0 {
		const user, group = 54321, 54322
		cfg.Credential = &syscall.Credential{Uid: user, Gid: group}
		want = append(want, fmt.Sprintf("uid %d gid %d", user, group))
		// The fake, unlike QEMU, is a script below a private folder, which
		// runs the test program, below another one.
		for _, p := range []string{cfg.Binary, mustExecutable(t)} {
			for dir := filepath.Dir(p); dir != "/"; dir = filepath.Dir(dir) {
				makeTraversable(t, dir)
			}
		}
		if err := os.Chmod(filepath.Dir(spec.Kernel), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	vm := launch(t, cfg, spec)
	c.wait(vm, "complete")
	for _, w := range want {
		if !strings.Contains(c.all(), w) {
			t.Errorf("no %q in what QEMU sees:\n%s", w, c.all())
		}
	}
}

func mustExecutable(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// makeTraversable lets everybody enter dir until the test ends.
func makeTraversable(t *testing.T, dir string) {
	t.Helper()
	fi, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Mode().Perm()&1 != 0 {
		return
	}
	if err := os.Chmod(dir, fi.Mode().Perm()|0o011); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Chmod(dir, fi.Mode().Perm()) })
}

func TestLaunchErrors(t *testing.T) {
	kernel, initrd := imageFiles(t)
	dir := filepath.Dir(kernel)
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	old := filepath.Join(dir, "qemu-old")
	writeScript(t, old, "echo 'QEMU emulator version 6.2.0'")
	broken := filepath.Join(dir, "qemu-broken")
	writeScript(t, broken, "echo 'cannot load libfoo.so' >&2; exit 127")
	other := filepath.Join(dir, "qemu-other")
	writeScript(t, other, "echo 'some other program'")
	noexec := filepath.Join(dir, "qemu-data")
	if err := os.WriteFile(noexec, []byte("data"), 0o644); err != nil {
		t.Fatal(err)
	}
	good := fakeBinary(t, "linger")
	type change func(*qemu.Config, *hypervisor.Spec)
	tests := map[string]struct {
		change change
		want   string
		kind   error
	}{
		"no kernel":             {func(_ *qemu.Config, s *hypervisor.Spec) { s.Kernel = dir + "/none" }, "start vm test: guest kernel: open " + dir + "/none: no such file or directory", os.ErrNotExist},
		"no initrd":             {func(_ *qemu.Config, s *hypervisor.Spec) { s.Initrd = dir + "/none" }, "start vm test: guest initrd: open " + dir + "/none: no such file or directory", os.ErrNotExist},
		"directory":             {func(_ *qemu.Config, s *hypervisor.Spec) { s.Kernel = dir }, "start vm test: guest kernel " + dir + ": not a regular file", nil},
		"empty file":            {func(_ *qemu.Config, s *hypervisor.Spec) { s.Kernel = empty }, "start vm test: guest kernel " + empty + ": the file is empty", nil},
		"no binary":             {func(c *qemu.Config, _ *hypervisor.Spec) { c.Binary = dir + "/none" }, "start vm test: find QEMU: exec: \"" + dir + "/none\": stat " + dir + "/none: no such file or directory", os.ErrNotExist},
		"no binary in PATH":     {func(c *qemu.Config, _ *hypervisor.Spec) { c.Binary = "qemu-none" }, "start vm test: find QEMU \"qemu-none\" in PATH: file does not exist", os.ErrNotExist},
		"not executable":        {func(c *qemu.Config, _ *hypervisor.Spec) { c.Binary = noexec }, "start vm test: find QEMU: exec: \"" + noexec + "\": permission denied", os.ErrPermission},
		"old binary":            {func(c *qemu.Config, _ *hypervisor.Spec) { c.Binary = old }, "start vm test: " + old + " is QEMU 6.2.0: want 7.2 or newer: unsupported operation", errors.ErrUnsupported},
		"broken binary":         {func(c *qemu.Config, _ *hypervisor.Spec) { c.Binary = broken }, "start vm test: run " + broken + " -version: exit status 127: cannot load libfoo.so", nil},
		"another program":       {func(c *qemu.Config, _ *hypervisor.Spec) { c.Binary = other }, "start vm test: run " + other + " -version: version \"some other program\": want QEMU emulator version N.N", nil},
		"bad spec":              {func(_ *qemu.Config, s *hypervisor.Spec) { s.CPUs = 0 }, "start vm test: vm spec: 0 CPUs: want 1 to 64", nil},
		"long kernel arguments": {func(_ *qemu.Config, s *hypervisor.Spec) { s.Cmdline = []string{strings.Repeat("x", 4096)} }, "start vm test: kernel command line of", nil},
		"start fails": {func(c *qemu.Config, _ *hypervisor.Spec) {
			c.Start = func(*exec.Cmd) error { return os.ErrDeadlineExceeded }
		}, "start vm test: start " + good + ": i/o timeout", os.ErrDeadlineExceeded},
		"start does nothing": {func(c *qemu.Config, _ *hypervisor.Spec) { c.Start = func(*exec.Cmd) error { return nil } }, "start vm test: start " + good + ": the start function started nothing", nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			spec := testSpec(t, kernel, initrd)
			cfg := qemu.Config{Binary: good, CacheDir: t.TempDir()}
			tt.change(&cfg, &spec)
			before := openFiles(t)
			vm, err := qemu.Launch(context.Background(), cfg, spec)
			if err == nil || vm != nil || !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("Launch() = %v, %v; want nil, %q", vm, err, tt.want)
			}
			if tt.kind != nil && !errors.Is(err, tt.kind) {
				t.Errorf("Launch() = %v; want it to match %v", err, tt.kind)
			}
			if diff := cmp.Diff(before, openFiles(t)); diff != "" {
				t.Errorf("descriptors before and after (-before +after):\n%s", diff)
			}
		})
	}
}

func writeScript(t *testing.T, path, body string) {
	t.Helper()
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
}

// openFiles lists the descriptors of this process that are not the runtime's.
func openFiles(t *testing.T) []string {
	t.Helper()
	// Files that only a finalizer would close are leaks, but those of other
	// tests are not this one's.
	runtime.GC()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || strings.HasPrefix(target, "anon_inode:[event") || strings.HasPrefix(target, "/proc/") {
			continue
		}
		list = append(list, e.Name()+" "+target)
	}
	slices.Sort(list)
	return list
}

// TestLaunchThatFailsLate: whatever is started by then does not survive.
func TestLaunchThatFailsLate(t *testing.T) {
	t.Run("start function fails after the fork", func(t *testing.T) {
		var pid int
		cfg := qemu.Config{Binary: fakeBinary(t, "linger"), CacheDir: t.TempDir(), Start: func(cmd *exec.Cmd) error {
			if err := cmd.Start(); err != nil {
				return err
			}
			pid = cmd.Process.Pid
			return errors.New("no such cgroup")
		}}
		testLateFailure(t, context.Background(), cfg, &pid, "no such cgroup")
	})
	t.Run("context ends during the start", func(t *testing.T) {
		var pid int
		ctx, cancel := context.WithCancelCause(context.Background())
		cfg := qemu.Config{Binary: fakeBinary(t, "linger"), CacheDir: t.TempDir(), Start: func(cmd *exec.Cmd) error {
			if err := cmd.Start(); err != nil {
				return err
			}
			pid = cmd.Process.Pid
			cancel(errors.New("the pod was removed"))
			return nil
		}}
		testLateFailure(t, ctx, cfg, &pid, "the pod was removed")
	})
}

func testLateFailure(t *testing.T, ctx context.Context, cfg qemu.Config, pid *int, want string) {
	t.Helper()
	spec := fakeSpec(t)
	before := openFiles(t)
	vm, err := qemu.Launch(ctx, cfg, spec)
	if err == nil || vm != nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Launch() = %v, %v; want nil, %q", vm, err, want)
	}
	if *pid == 0 {
		t.Fatal("nothing was started")
	}
	if err := syscall.Kill(*pid, 0); err != syscall.ESRCH {
		t.Errorf("kill(%d, 0) = %v; want ESRCH: killed and reaped", *pid, err)
	}
	if diff := cmp.Diff(before, openFiles(t)); diff != "" {
		t.Errorf("descriptors before and after (-before +after):\n%s", diff)
	}
}

func TestLaunchWithEndedContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	started := false
	cfg := qemu.Config{Binary: fakeBinary(t, "linger"), CacheDir: t.TempDir(), Start: func(cmd *exec.Cmd) error {
		started = true
		return cmd.Start()
	}}
	if vm, err := qemu.Launch(ctx, cfg, fakeSpec(t)); !errors.Is(err, context.Canceled) || vm != nil || started {
		t.Errorf("Launch() = %v, %v, started %v; want a cancellation before the start", vm, err, started)
	}
}

// TestParentDeath: QEMU does not outlive the thread that started it.
func TestParentDeath(t *testing.T) {
	vms := make(chan hypervisor.VM)
	end := make(chan struct{})
	go endingThread(func() {
		vms <- launchFake(t, "linger", qemu.Config{})
		<-end
	})
	vm := <-vms
	select {
	case <-vm.Done():
		t.Fatalf("the machine ended early: %v", vm.Err())
	case <-time.After(50 * time.Millisecond):
	}
	close(end)
	waitDone(t, vm)
	if err := vm.Err(); err == nil || !strings.Contains(err.Error(), "signal: killed") {
		t.Errorf("Err() = %v; want killed", err)
	}
}

// endingThread runs f on a thread that ends with it: a goroutine that ends
// locked takes its thread along, unless that is the process's first.
func endingThread(f func()) {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		f()
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		endingThread(f)
	}()
	<-done
}

// TestNothingLeft: goroutines and descriptors after many machines.
func TestNothingLeft(t *testing.T) {
	run := func() {
		spec := fakeSpec(t)
		vm := launch(t, qemu.Config{Binary: fakeBinary(t, "linger")}, spec)
		kill(t, vm)
		spec.Vsock.Backend.Close()
	}
	run()
	goroutines, files := runtime.NumGoroutine(), len(openFiles(t))
	for range 10 {
		run()
	}
	// The backend's own goroutine and socket stay until the test ends.
	if got := runtime.NumGoroutine(); got > goroutines+10 {
		t.Errorf("%d goroutines after 10 machines; want at most %d", got, goroutines+10)
	}
	if got := len(openFiles(t)); got > files+10 {
		t.Errorf("%d descriptors after 10 machines; want at most %d", got, files+10)
	}
}
