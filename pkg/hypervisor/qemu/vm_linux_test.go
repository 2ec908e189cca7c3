package qemu_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/hypervisor/qemu"
	"github.com/vmrt/vmrt/pkg/storage"
	"github.com/vmrt/vmrt/tests/platform"
)

// eachKernel runs a test with every kind of kernel.
func eachKernel(t *testing.T, test func(t *testing.T, spec hypervisor.Spec)) {
	qemuBinary(t)
	initrd := testInitrd(t)
	for _, kind := range []string{guest.Tuned, guest.Stock} {
		t.Run(kind, func(t *testing.T) { test(t, testSpec(t, kernelOf(t, kind), initrd)) })
	}
}

// tuned runs a test with the kernel that has its drivers built in.
func tuned(t *testing.T) hypervisor.Spec {
	t.Helper()
	qemuBinary(t)
	return testSpec(t, kernelOf(t, guest.Tuned), testInitrd(t))
}

func TestIntegrationBootAndKill(t *testing.T) {
	eachKernel(t, func(t *testing.T, spec hypervisor.Spec) {
		before := openFiles(t)
		c := newConsole(t)
		vm := launch(t, qemu.Config{Console: c.line}, spec)
		t.Logf("Launch returned after %v", time.Since(c.start))
		c.wait(vm, "vmrt-test: ready")
		t.Log("\n" + c.all())
		checkClock(t, c)
		checkQMP(t, vm)
		pid := vm.Pid()
		kill(t, vm)
		if err := syscall.Kill(pid, 0); err != syscall.ESRCH {
			t.Errorf("kill(%d, 0) = %v; want ESRCH", pid, err)
		}
		if err := vm.Err(); err != nil {
			t.Errorf("Err() after Kill = %v", err)
		}
		if diff := cmp.Diff(before, openFiles(t)); diff != "" {
			t.Errorf("descriptors before and after (-before +after):\n%s", diff)
		}
	})
}

// checkClock: a guest that distrusts its counter follows a timer interrupt.
func checkClock(t *testing.T, c *console) {
	t.Helper()
	if s := c.all(); !strings.Contains(s, "clocksource tsc") && !strings.Contains(s, "clocksource kvm-clock") {
		t.Errorf("the guest does not use the time stamp counter:\n%s", s)
	}
}

func checkQMP(t *testing.T, vm hypervisor.VM) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := vm.(*qemu.VM).QMP(ctx)
	if err != nil {
		t.Fatalf("QMP() = %v", err)
	}
	var status struct{ Status string }
	if err := c.Execute(ctx, "query-status", nil, &status); err != nil || status.Status != "running" {
		t.Errorf("query-status = %+v, %v; want running", status, err)
	}
}

func TestIntegrationGuestStops(t *testing.T) {
	eachKernel(t, func(t *testing.T, spec hypervisor.Spec) {
		for verb, want := range map[string]string{
			"poweroff": "vm test: the guest stopped: it powered off",
			"reset":    "vm test: the guest stopped: it reset",
			"exit":     "vm test: the guest stopped: it reset",
		} {
			t.Run(verb, func(t *testing.T) {
				s := testSpec(t, spec.Kernel, spec.Initrd)
				// What the kernel does not know becomes init's argument.
				s.Cmdline = []string{verb}
				if verb == "poweroff" && s.CmdlineDevices {
					want = "vm test: the guest stopped: it reset" // no ACPI
				}
				c := newConsole(t)
				vm := launch(t, qemu.Config{Console: c.line}, s)
				c.wait(vm, "vmrt-test: ready")
				waitDone(t, vm)
				err := vm.Err()
				if !errors.Is(err, hypervisor.ErrGuestStopped) || !strings.HasPrefix(err.Error(), want) {
					t.Errorf("Err() = %v; want %q\n%s", err, want, c.all())
				}
				if verb == "exit" && !strings.Contains(err.Error(), "Kernel panic - not syncing: Attempted to kill init") {
					t.Errorf("Err() = %v; want the kernel's last words", err)
				}
			})
		}
	})
}

func TestIntegrationSMP(t *testing.T) {
	eachKernel(t, func(t *testing.T, spec hypervisor.Spec) {
		spec.CPUs = 2
		c := newConsole(t)
		vm := launch(t, qemu.Config{Console: c.line}, spec)
		c.wait(vm, "vmrt-test: ready")
		if want := "vmrt-test: cpus 0-1"; !strings.Contains(c.all(), want) {
			t.Errorf("no %q on the console:\n%s", want, c.all())
		}
		checkClock(t, c)
	})
}

// TestIntegrationUnprivileged runs QEMU as a user that may do nothing, with the
// guest's files below a folder that it cannot enter.
func TestIntegrationUnprivileged(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to become another user")
	}
	spec := tuned(t)
	dir := t.TempDir()
	link := filepath.Join(dir, "vmlinux")
	if err := os.Symlink(spec.Kernel, link); err != nil {
		t.Fatal(err)
	}
	spec.Kernel = link
	if err := os.Chmod(filepath.Dir(spec.Initrd), 0o700); err != nil {
		t.Fatal(err)
	}
	cfg := qemu.Config{Credential: &syscall.Credential{Uid: 54321, Gid: 54321}}
	c := newConsole(t)
	cfg.Console = c.line
	cfg.Binary, cfg.CacheDir = qemuBinary(t), cacheDir()
	vm, err := qemu.Launch(context.Background(), cfg, spec)
	if spec.Accelerator == hypervisor.KVM && errors.Is(err, os.ErrPermission) {
		t.Skipf("QEMU before 9.0 must open /dev/kvm itself: %v", err)
	}
	if err != nil {
		t.Fatalf("Launch() = %v", err)
	}
	defer kill(t, vm)
	c.wait(vm, "vmrt-test: ready")
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", vm.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Uid:\t54321\t54321\t54321\t54321\n", "Groups:\t \n", "CapEff:\t0000000000000000\n", "Seccomp:\t2\n", "NoNewPrivs:\t1\n"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("no %q in QEMU's status:\n%s", want, status)
		}
	}
	kill(t, vm)

	t.Run("unreadable kernel", func(t *testing.T) {
		secret := filepath.Join(dir, "secret")
		b, err := os.ReadFile(spec.Kernel)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(secret, b, 0o600); err != nil {
			t.Fatal(err)
		}
		s := testSpec(t, secret, spec.Initrd)
		vm := launch(t, qemu.Config{Credential: cfg.Credential}, s)
		waitDone(t, vm)
		if err := vm.Err(); err == nil || !strings.Contains(err.Error(), secret) || !strings.Contains(err.Error(), "Permission denied") {
			t.Errorf("Err() = %v; want a denied permission for %s", err, secret)
		}
	})
}

// TestIntegrationBadKernel: what QEMU says of it is in the error.
func TestIntegrationBadKernel(t *testing.T) {
	qemuBinary(t)
	_, initrd := imageFiles(t)
	vm := launch(t, qemu.Config{}, testSpec(t, "/proc/self/exe", initrd))
	waitDone(t, vm)
	if err := vm.Err(); err == nil || !strings.Contains(err.Error(), "exit status 1: ") || !strings.Contains(err.Error(), "kernel") {
		t.Errorf("Err() = %v; want QEMU's complaint about the kernel", err)
	}
}

func TestIntegrationFlood(t *testing.T) {
	spec := tuned(t)
	spec.Cmdline = []string{"--", "flood"}
	c := newConsole(t)
	vm := launch(t, qemu.Config{Console: c.line}, spec)
	c.wait(vm, "flood [31mflood [31mflood")
	checkQMP(t, vm)
	kill(t, vm)
	if strings.ContainsAny(c.all(), "\x00\x1b") {
		t.Error("control characters in the console's lines")
	}
}

// TestIntegrationInterfaces: the guest numbers its interfaces in the spec's
// order.
func TestIntegrationInterfaces(t *testing.T) {
	spec := tuned(t)
	for i, tap := range taps(t, 4) {
		nic := hypervisor.NIC{MAC: fmt.Sprintf("02:00:00:00:00:%02x", i), Tap: []*os.File{tap}}
		spec.NICs = append(spec.NICs, nic)
	}
	c := newConsole(t)
	vm := launch(t, qemu.Config{Console: c.line}, spec)
	c.wait(vm, "vmrt-test: ready")
	for i, n := range spec.NICs {
		if want := fmt.Sprintf("vmrt-test: eth%d %s", i, n.MAC); !strings.Contains(c.all(), want) {
			t.Errorf("no %q on the console:\n%s", want, c.all())
		}
	}
}

// taps makes tap devices in a network namespace of their own.
func taps(t *testing.T, n int) []*os.File {
	t.Helper()
	type result struct {
		files []*os.File
		err   error
	}
	made := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends here
		var r result
		if r.err = unix.Unshare(unix.CLONE_NEWNET); r.err == nil {
			for i := 0; i < n && r.err == nil; i++ {
				var f *os.File
				if f, r.err = openTap(fmt.Sprintf("tap%d", i)); r.err == nil {
					r.files = append(r.files, f)
				}
			}
		}
		made <- r
	}()
	r := <-made
	t.Cleanup(func() {
		for _, f := range r.files {
			f.Close()
		}
	})
	if errors.Is(r.err, os.ErrPermission) || errors.Is(r.err, os.ErrNotExist) {
		t.Skipf("cannot make a tap: %v", r.err)
	}
	if r.err != nil {
		t.Fatal(r.err)
	}
	return r.files
}

func openTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	request, err := unix.NewIfreq(name)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// TestIntegrationShare reads a file through a virtiofsd.
func TestIntegrationShare(t *testing.T) {
	daemon, err := platform.Virtiofsd(storage.FindDaemon)
	if err != nil {
		skip(t, "%v", err)
	}
	if os.Geteuid() != 0 {
		t.Skip("virtiofsd needs root")
	}
	spec := tuned(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "hello"), []byte("from the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "fs.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	listener, err := l.File()
	l.SetUnlinkOnClose(false)
	l.Close()
	if err != nil {
		t.Fatal(err)
	}
	// Both virtiofsd, in C and in Rust, know these arguments.
	cmd := exec.Command(daemon, "--fd=3", "-o", "source="+dir, "-o", "sandbox=chroot")
	cmd.ExtraFiles = []*os.File{listener}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	listener.Close()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	socket, err := conn.(*net.UnixConn).File()
	conn.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.Close() })
	spec.Shares = []hypervisor.Share{{Tag: "share", Socket: socket}}
	spec.Cmdline = []string{"read"}
	c := newConsole(t)
	vm := launch(t, qemu.Config{Console: c.line}, spec)
	c.wait(vm, "vmrt-test: hello is from the host")
}

// BenchmarkBoot measures from the call of Launch until the guest's init says
// that it runs, and the processor time that QEMU has used by then.
func BenchmarkBoot(b *testing.B) {
	qemuBinary(b)
	initrd := testInitrd(b)
	for _, kind := range []string{guest.Tuned, guest.Stock} {
		b.Run(kind, func(b *testing.B) {
			kernel := kernelOf(b, kind)
			var cpu time.Duration
			for b.Loop() {
				spec := testSpec(b, kernel, initrd)
				c := newConsole(b)
				vm := launch(b, qemu.Config{Console: c.line}, spec)
				c.wait(vm, "vmrt-test: ready")
				b.StopTimer()
				cpu += processorTime(b, vm.Pid())
				kill(b, vm)
				b.StartTimer()
			}
			b.ReportMetric(float64(cpu.Milliseconds())/float64(b.N), "cpu-ms/op")
			b.ReportMetric(float64(b.Elapsed().Milliseconds())/float64(b.N), "ms/op")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// processorTime returns what a process has used so far (proc(5), stat).
func processorTime(t testing.TB, pid int) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	var ticks int64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / 100)
}
