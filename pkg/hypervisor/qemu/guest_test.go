package qemu_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/hypervisor/accel"
	"github.com/vmrt/vmrt/pkg/hypervisor/qemu"
)

// qemuBinary returns the QEMU to test with.
func qemuBinary(t testing.TB) string {
	t.Helper()
	name := os.Getenv("VMRT_QEMU")
	if name == "" {
		name = "qemu-system-x86_64"
	}
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("no QEMU: %v", err)
	}
	return path
}

// kernels returns the guest kernels that were built, by name.
func kernels(t testing.TB) map[string]string {
	t.Helper()
	patterns := filepath.SplitList(os.Getenv("VMRT_TEST_KERNELS"))
	if len(patterns) == 0 {
		cache, err := os.UserCacheDir()
		if err != nil {
			t.Skipf("no cache folder: %v", err)
		}
		patterns = []string{filepath.Join(cache, "vmrt", "kernel-stock-*", "vmlinux"), filepath.Join(cache, "vmrt", "kernel-tuned-*", "vmlinux")}
	}
	found := make(map[string]string)
	for _, p := range patterns {
		paths, err := filepath.Glob(p)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			found[filepath.Base(filepath.Dir(path))] = path
		}
	}
	if len(found) == 0 {
		t.Skipf("no guest kernel matches %q", patterns)
	}
	return found
}

// testInitrd returns an initramfs with testdata/init in it, built now unless
// VMRT_TEST_INITRD names one that was.
func testInitrd(t testing.TB) string {
	t.Helper()
	if path := os.Getenv("VMRT_TEST_INITRD"); path != "" {
		return path
	}
	dir := t.TempDir()
	program := filepath.Join(dir, "init")
	build := exec.Command("go", "build", "-ldflags=-s -w", "-o", program, "./testdata/init")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build testdata/init: %v\n%s", err, out)
	}
	content, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	entry := func(name string, mode, major, minor int, content []byte) {
		// newc: Documentation/driver-api/early-userspace/buffer-format.rst
		fmt.Fprintf(&b, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", 0, mode, 0, 0, 1, 0,
			len(content), 0, 0, major, minor, len(name)+1, 0)
		b.WriteString(name + "\x00")
		b.Write(make([]byte, -b.Len()&3))
		b.Write(content)
		b.Write(make([]byte, -b.Len()&3))
	}
	entry("dev", 0o040755, 0, 0, nil)
	entry("dev/console", 0o020600, 5, 1, nil)
	entry("init", 0o100755, 0, 0, content)
	entry("TRAILER!!!", 0, 0, 0, nil)
	path := filepath.Join(dir, "initrd")
	if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// console collects a machine's console.
type console struct {
	t     testing.TB
	start time.Time
	mu    sync.Mutex
	lines []string // guarded by mu
	more  chan struct{}
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
	limit := time.After(60 * time.Second)
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
			c.t.Fatalf("no %q on the console within a minute\n%s", text, c.all())
		}
	}
}

// testSpec returns a small machine with whatever accelerates it here. Its vsock
// device is the kernel's under KVM, if that has one, and else a silent one.
func testSpec(t *testing.T, kernel, initrd string) hypervisor.Spec {
	t.Helper()
	chosen, err := accel.Choose(context.Background(), hypervisor.Auto, accel.Config{CacheDir: cacheDir()})
	if err != nil {
		t.Fatal(err)
	}
	spec := hypervisor.Spec{
		Name: "test", Accelerator: chosen.Accelerator, CPUs: 1, MemoryMiB: 128, Kernel: kernel, Initrd: initrd,
		Vsock: hypervisor.Vsock{CID: uint32(os.Getpid())<<8 | machines.Add(1)&0xff},
	}
	if f, err := os.OpenFile("/dev/vhost-vsock", os.O_RDWR, 0); err == nil && chosen.Accelerator == hypervisor.KVM {
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
func launch(t *testing.T, cfg qemu.Config, spec hypervisor.Spec) hypervisor.VM {
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

func kill(t *testing.T, vm hypervisor.VM) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := vm.Kill(ctx); err != nil {
		t.Errorf("Kill() = %v", err)
	}
}
