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
// inherited QEMU's stderr, and loses nothing that was said before.
func TestOrphanHoldsPipes(t *testing.T) {
	start := time.Now()
	vm := launchFake(t, "orphan", qemu.Config{})
	for syscall.Kill(vm.Pid(), 0) == nil {
		time.Sleep(time.Millisecond) // until it is reaped
	}
	// Too late to be the reason, although the machine may not be done yet.
	kill(t, vm)
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
		letEverybodyRun(t, cfg.Binary)
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

// letEverybodyRun makes a fake usable for all users: unlike QEMU it is a script
// below a private folder, which runs the test program, below another one.
func letEverybodyRun(t *testing.T, fake string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{fake, self} {
		for dir := filepath.Dir(p); dir != "/"; dir = filepath.Dir(dir) {
			makeTraversable(t, dir)
		}
	}
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

// TestParentDeath: QEMU does not outlive the thread that started it, whoever it
// runs as.
func TestParentDeath(t *testing.T) {
	t.Run("same user", func(t *testing.T) { testParentDeath(t, qemu.Config{}) })
	t.Run("another user", func(t *testing.T) {
		if os.Geteuid() != 0 {
			t.Skip("needs root to become another user")
		}
		testParentDeath(t, qemu.Config{Credential: &syscall.Credential{Uid: 54321, Gid: 54322}})
	})
}

func testParentDeath(t *testing.T, cfg qemu.Config) {
	cfg.Binary = fakeBinary(t, "linger")
	if cfg.Credential != nil {
		letEverybodyRun(t, cfg.Binary)
	}
	spec := fakeSpec(t)
	vms := make(chan hypervisor.VM)
	end := make(chan struct{})
	go endingThread(func() {
		vms <- launch(t, cfg, spec)
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

// TestWithoutPidfd: a start function, or an old kernel, may yield none.
func TestWithoutPidfd(t *testing.T) {
	vm := launchFake(t, "fail", qemu.Config{Start: func(cmd *exec.Cmd) error {
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		return cmd.Start()
	}})
	waitDone(t, vm)
	if err := vm.Err(); err == nil || !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("Err() = %v; want exit status 1", err)
	}
	running := launchFake(t, "linger", qemu.Config{Start: func(cmd *exec.Cmd) error {
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		return cmd.Start()
	}})
	kill(t, running)
}

// TestReapedByOthers: whoever waits for any child takes QEMU's status away, but
// not its end.
func TestReapedByOthers(t *testing.T) {
	for _, killed := range []bool{false, true} {
		vm := launchFake(t, "linger", qemu.Config{})
		stolen := make(chan error, 1)
		go func() {
			_, err := syscall.Wait4(vm.Pid(), nil, 0, nil)
			stolen <- err
		}()
		if killed {
			kill(t, vm)
		} else if err := syscall.Kill(vm.Pid(), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		waitDone(t, vm)
		if err := <-stolen; err != nil {
			t.Logf("the status was not taken away: %v", err)
			continue
		}
		if err := vm.Err(); (err == nil) != killed {
			t.Errorf("Err() after Kill %v = %v", killed, err)
		}
	}
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
