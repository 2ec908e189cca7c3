package qemu_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/guest/initramfs"
	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/hypervisor/accel"
	"github.com/vmrt/vmrt/pkg/hypervisor/qemu"
	"github.com/vmrt/vmrt/tests/platform"
)

// skip skips the test for what the machine lacks, unless it must run.
func skip(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("VMRT_REQUIRE_VM") == "1" {
		t.Fatalf("VMRT_REQUIRE_VM=1, but: "+format, args...)
	}
	t.Skipf(format, args...)
}

// qemuBinary returns the QEMU to test with.
func qemuBinary(t testing.TB) string {
	t.Helper()
	path, err := platform.QEMU()
	if err != nil {
		skip(t, "%v", err)
	}
	return path
}

// kernelOf returns the path of a kernel that was built.
func kernelOf(t testing.TB, kind string) string {
	t.Helper()
	root := os.Getenv("VMRT_GUEST")
	if root == "" {
		root = "../../../bin/guest"
	}
	kernel, err := filepath.Abs(filepath.Join(root, kind, guest.KernelFile))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(kernel); err != nil {
		skip(t, "no %s guest kernel: %v", kind, err)
	}
	return kernel
}

// testInitrd returns an initramfs with testdata/init in it.
func testInitrd(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	program, err := platform.Build("pkg/hypervisor/qemu/testdata/init", dir)
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "initrd")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	var a initramfs.Archive
	if err := errors.Join(a.File("init", 0o755, content), a.CharDevice("dev/console", 0o600, 5, 1)); err != nil {
		t.Fatal(err)
	}
	if _, err := a.WriteTo(f); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// console collects a machine's console.
type console struct {
	t     testing.TB
	start time.Time
	more  chan struct{} // has a value when there are new lines

	mu    sync.Mutex
	lines []string // guarded by mu
}

func newConsole(t testing.TB) *console {
	return &console{t: t, start: time.Now(), more: make(chan struct{}, 1)}
}

func (c *console) line(s string) {
	c.mu.Lock()
	c.lines = append(c.lines, fmt.Sprintf("[%6.3f] %s", time.Since(c.start).Seconds(), s))
	c.mu.Unlock()
	select {
	case c.more <- struct{}{}:
	default:
	}
}

func (c *console) all() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(c.lines, "\n")
}

// wait returns once the console has shown text.
func (c *console) wait(vm hypervisor.VM, text string) {
	c.t.Helper()
	limit := time.After(bootTimeout)
	for {
		if strings.Contains(c.all(), text) {
			return
		}
		select {
		case <-c.more:
		case <-vm.Done():
			if strings.Contains(c.all(), text) {
				return
			}
			c.t.Fatalf("the machine ended without %q: %v\n%s", text, vm.Err(), c.all())
		case <-limit:
			c.t.Fatalf("no %q on the console within %v\n%s", text, bootTimeout, c.all())
		}
	}
}

// bootTimeout bounds a boot on a busy machine without hardware virtualisation.
const bootTimeout = 3 * time.Minute

// testSpec returns a small machine with whatever accelerates it here. Its vsock
// device is the kernel's under KVM, if that has one, and else a silent one.
func testSpec(t testing.TB, kernel, initrd string) hypervisor.Spec {
	t.Helper()
	accelerator, err := platform.Accelerator(context.Background(), accel.Config{CacheDir: cacheDir()})
	if err != nil {
		t.Fatal(err)
	}
	spec := hypervisor.Spec{
		Name: "test", Accelerator: accelerator, CPUs: 1, MemoryMiB: 128, Kernel: kernel, Initrd: initrd,
		Vsock: hypervisor.Vsock{CID: uint32(os.Getpid())<<8 | machines.Add(1)&0xff},

		CmdlineDevices: guest.CmdlineDevices(filepath.Base(filepath.Dir(kernel))),
	}
	if f, err := os.OpenFile("/dev/vhost-vsock", os.O_RDWR, 0); err == nil && accelerator == hypervisor.KVM {
		spec.Vsock.VhostFD = f
		t.Cleanup(func() { f.Close() })
		return spec
	}
	backend := silentVsock(t, uint64(spec.Vsock.CID))
	t.Cleanup(func() { backend.Close() })
	spec.Vsock.Backend = backend
	return spec
}

// machines numbers the machines of this process.
var machines atomic.Uint32

// cacheDir is shared by the tests: what they ask about the host is the same.
var cacheDir = sync.OnceValue(func() string {
	dir, err := os.MkdirTemp("", "vmrt-qemu-test-")
	if err != nil {
		panic(err)
	}
	return dir
})

// launch starts a machine and kills it at the end of the test.
func launch(t testing.TB, cfg qemu.Config, spec hypervisor.Spec) hypervisor.VM {
	t.Helper()
	if cfg.Binary == "" {
		cfg.Binary = qemuBinary(t)
	}
	if cfg.CacheDir == "" {
		cfg.CacheDir = cacheDir()
	}
	vm, err := qemu.Launch(context.Background(), cfg, spec)
	if err != nil {
		t.Fatalf("Launch() = %v", err)
	}
	t.Cleanup(func() { kill(t, vm) })
	return vm
}

func kill(t testing.TB, vm hypervisor.VM) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := vm.Kill(ctx); err != nil {
		t.Errorf("Kill() = %v", err)
	}
}
