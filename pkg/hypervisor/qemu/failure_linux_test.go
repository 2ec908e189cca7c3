package qemu_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/hypervisor/qemu"
)

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
