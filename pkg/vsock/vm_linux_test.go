package vsock_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/guest/initramfs"
	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/hypervisor/accel"
	"github.com/vmrt/vmrt/pkg/hypervisor/qemu"
	"github.com/vmrt/vmrt/pkg/vsock"
	"github.com/vmrt/vmrt/pkg/vsock/internal/exchange"
	"github.com/vmrt/vmrt/tests/platform"
)

// bootTimeout bounds a boot on a busy machine without hardware virtualisation.
const bootTimeout = 3 * time.Minute

// skip skips the test for what the machine lacks, unless it must run.
func skip(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("VMRT_REQUIRE_VM") == "1" {
		t.Fatalf("VMRT_REQUIRE_VM=1, but: "+format, args...)
	}
	t.Skipf(format, args...)
}

// machine is a virtual machine that runs vsockguest.
type machine struct {
	vsock.Transport
	vm   hypervisor.VM
	host vsock.Conn // the one that the guest has dialled

	mu      sync.Mutex
	console []string
}

// boot starts a machine with a kind of kernel and the transport of a mode.
// extra are arguments for QEMU.
func boot(t testing.TB, kind, mode string, extra ...string) *machine {
	t.Helper()
	files := guestFiles(t, kind)
	binary, err := platform.QEMU()
	if err != nil {
		skip(t, "%v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
	defer cancel()
	m := &machine{}
	if m.Transport, err = vsock.Open(mode); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Transport.Close() })
	device := m.Device()
	early := make(chan error, 1)
	go func() {
		c, err := m.Dial(ctx, exchange.Port)
		if err == nil {
			c.Close()
		}
		early <- err
	}()
	m.vm, err = qemu.Launch(ctx, qemu.Config{
		Binary: wrapper(t, binary, extra), Start: lockedStart(t), Console: m.line, CacheDir: t.TempDir(),
	}, hypervisor.Spec{
		Name: "vsock-test", Accelerator: accelerator(ctx, t), CPUs: 1, MemoryMiB: 128,
		Kernel: filepath.Join(files, guest.KernelFile), Initrd: initrd(t, files), Vsock: device,
		Cmdline: []string{fmt.Sprint(exchange.PortArg, m.HostPort())},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.vm.Kill(context.Background()) })
	t.Cleanup(func() {
		if t.Failed() {
			m.mu.Lock()
			defer m.mu.Unlock()
			t.Logf("console:\n%s", strings.Join(m.console, "\n"))
		}
	})
	for _, f := range []*os.File{device.Backend, device.VhostFD} {
		if f != nil {
			f.Close()
		}
	}
	if m.host, err = m.Accept(ctx); err != nil {
		t.Fatalf("the guest does not dial: %v, %v", err, m.vm.Err())
	}
	t.Cleanup(func() { m.host.Close() })
	if err := <-early; err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
		// The guest's driver is ready before its program listens.
		t.Errorf("Dial before the start: %v; want a connection, or %v", err, syscall.ECONNREFUSED)
	}
	return m
}

func (m *machine) line(s string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.console = append(m.console, s)
}

// guestFiles returns the folder of the guest files with a kind of kernel.
func guestFiles(t testing.TB, kind string) string {
	t.Helper()
	root := os.Getenv("VMRT_GUEST")
	if root == "" {
		root = "../../bin/guest"
	}
	dir, err := filepath.Abs(filepath.Join(root, kind))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := guest.Load(dir); err != nil {
		skip(t, "no guest files: %v; make build", err)
	}
	return dir
}

// initrd returns the path of an archive whose init is vsockguest. With a
// kernel that needs modules it comes behind the guest files' own, and
// overwrites init.
func initrd(t testing.TB, files string) string {
	t.Helper()
	program, err := buildGuest()
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := guest.Load(files)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if manifest.Initramfs.Modules > 0 {
		shipped, err := os.ReadFile(filepath.Join(files, guest.InitramfsFile))
		if err != nil {
			t.Fatal(err)
		}
		b.Write(shipped)
	}
	var a initramfs.Archive
	if err := errors.Join(a.File("init", 0o755, program), a.CharDevice("dev/console", 0o600, 5, 1)); err != nil {
		t.Fatal(err)
	}
	if _, err := a.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(name, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

// buildGuest returns the guest's program, which is built once.
var buildGuest = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "vsockguest")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	program, err := platform.Build("pkg/vsock/internal/vsockguest", dir)
	if err != nil {
		return nil, err
	}
	return os.ReadFile(program)
})

// wrapper returns a program that is binary with further arguments.
func wrapper(t testing.TB, binary string, extra []string) string {
	if len(extra) == 0 {
		return binary
	}
	t.Helper()
	name := filepath.Join(t.TempDir(), "qemu")
	script := fmt.Sprintf("#!/bin/sh\nexec %s \"$@\" %s\n", binary, strings.Join(extra, " "))
	if err := os.WriteFile(name, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return name
}

// accelerator returns what is to execute the guest.
func accelerator(ctx context.Context, t testing.TB) hypervisor.Accelerator {
	t.Helper()
	a, err := platform.Accelerator(ctx, accel.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// lockedStart starts a command from a thread that lives as long as the test:
// QEMU ends with the thread that has forked it.
func lockedStart(t testing.TB) hypervisor.StartFunc {
	commands, results := make(chan *exec.Cmd), make(chan error)
	go func() {
		runtime.LockOSThread()
		for cmd := range commands {
			results <- cmd.Start()
		}
	}()
	t.Cleanup(func() { close(commands) })
	return func(cmd *exec.Cmd) error {
		commands <- cmd
		return <-results
	}
}

// TestVM uses connections to and from a real guest in all ways.
func TestVM(t *testing.T) {
	for _, kind := range []string{guest.Tuned, guest.Stock} {
		t.Run(kind, func(t *testing.T) { testStreams(t, kind, vsock.VhostUser) })
	}
}

// TestKVM is TestVM with the kernel's device.
func TestKVM(t *testing.T) {
	if _, err := os.Stat("/dev/vhost-vsock"); err != nil {
		if platform.Lab() {
			t.Fatal(err)
		}
		t.Skipf("needs a real KVM and vhost-vsock: %v; make test-kvm", err)
	}
	testStreams(t, guest.Tuned, vsock.Vhost)
}

func testStreams(t *testing.T, kind, mode string) {
	m := boot(t, kind, mode)
	if m.Name() != mode {
		t.Errorf("Name() = %q; want %q", m.Name(), mode)
	}
	t.Run("Echo", func(t *testing.T) { echo(t, m.dial(t, exchange.Port), 1, 5<<20) })
	t.Run("EchoOfGuestsConn", func(t *testing.T) { echo(t, m.host, 2, 1<<20) })
	t.Run("Parallel", m.testParallel)
	t.Run("HalfClose", m.testHalfClose)
	t.Run("GuestCloses", m.testGuestCloses)
	t.Run("Refused", m.testRefused)
	t.Run("SmallBuffer", m.testSmallBuffer)
	t.Run("ManyUnread", m.testManyUnread)
	t.Run("ManyShort", m.testManyShort)
	t.Run("Abandoned", m.testAbandoned)
	t.Run("End", m.testEnd)
}

// TestPause stops and continues the machine during a transfer. The driver's
// queues go on where they were.
func TestPause(t *testing.T) {
	path := filepath.Join(t.TempDir(), "monitor")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	m := boot(t, guest.Tuned, vsock.VhostUser, "-chardev", "socket,id=pause,path="+path, "-mon", "chardev=pause,mode=control")
	monitor, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer monitor.Close()
	monitor.SetDeadline(time.Now().Add(time.Minute))
	answers := json.NewDecoder(monitor)
	execute := func(command string) {
		t.Helper()
		if _, err := fmt.Fprintf(monitor, `{"execute": %q}`, command); err != nil {
			t.Fatal(err)
		}
		for {
			var answer map[string]any // or the greeting, or an event
			if err := answers.Decode(&answer); err != nil {
				t.Fatal(err)
			}
			if answer["error"] != nil {
				t.Fatalf("%s: %v", command, answer["error"])
			}
			if _, ok := answer["return"]; ok {
				return
			}
		}
	}
	execute("qmp_capabilities")
	c := m.dial(t, exchange.Port)
	done := make(chan struct{})
	go func() {
		defer close(done)
		echo(t, c, 7, 10<<20)
	}()
	for pauses := 0; ; pauses++ {
		execute("stop")
		execute("cont")
		select {
		case <-done:
			t.Logf("%d pauses", pauses)
			// A connection made after all that.
			echo(t, m.dial(t, exchange.Port), 8, 1<<20)
			return
		default:
		}
	}
}

func timeout(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func (m *machine) dial(t testing.TB, port uint32) vsock.Conn {
	t.Helper()
	c, err := m.Dial(timeout(t), port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(2 * time.Minute))
	return c
}

// echo sends n bytes in pieces of all sizes and compares what comes back.
func echo(t *testing.T, c net.Conn, seed uint64, n int) {
	t.Helper()
	want := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed)}).Read(want)
	sent := make(chan error, 1)
	go func() {
		err := exchange.Request(c, exchange.Echo, uint64(n))
		r := rand.New(rand.NewPCG(seed, 0))
		for b := want; err == nil && len(b) > 0; {
			k := min(len(b), 1+r.IntN(100_000))
			_, err = c.Write(b[:k])
			b = b[k:]
		}
		sent <- err
	}()
	got := make([]byte, n)
	_, err := io.ReadFull(c, got)
	if err := errors.Join(err, <-sent); err != nil {
		t.Error(err)
	} else if !bytes.Equal(got, want) {
		t.Errorf("%d bytes came back changed", n)
	}
}

func (m *machine) testParallel(t *testing.T) {
	var wg sync.WaitGroup
	for i := range uint64(20) {
		c := m.dial(t, exchange.Port)
		wg.Go(func() { echo(t, c, i, 200<<10) })
	}
	wg.Wait()
}

func (m *machine) testHalfClose(t *testing.T) {
	c := m.dial(t, exchange.PortUpper)
	if _, err := c.Write([]byte("half")); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err != nil || string(got) != "HALF" {
		t.Errorf("answer = %q, %v; want %q", got, err, "HALF")
	}
}

func (m *machine) testGuestCloses(t *testing.T) {
	c := m.dial(t, exchange.PortClose)
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("Read = %d, %v; want 0, EOF", n, err)
	}
	if _, err := c.Write([]byte("x")); err == nil {
		t.Error("Write to a closed connection = nil; want an error")
	}
}

func (m *machine) testRefused(t *testing.T) {
	if _, err := m.Dial(timeout(t), 4000); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("Dial of a port without listener: %v; want %v", err, syscall.ECONNREFUSED)
	}
}

// A guest with a small buffer goes only that far ahead, too.
func (m *machine) testSmallBuffer(t *testing.T) {
	c := m.dial(t, exchange.PortSmall)
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	echo(t, c, 4, 200_000)
}

// Many small writes that the guest does not read for a while.
func (m *machine) testManyUnread(t *testing.T) {
	for _, size := range []int{1, 100, 200, 1000} {
		c := m.dial(t, exchange.PortHold)
		const total = 300_000 // more than the credit
		if err := exchange.Request(c, exchange.Sink, total); err != nil {
			t.Fatal(err)
		}
		c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		sent := 0
		var err error
		for buf := make([]byte, size); err == nil && sent < total; {
			var n int
			n, err = c.Write(buf[:min(size, total-sent)])
			sent += n
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("write %d of %d bytes, in pieces of %d: %v", sent, total, size, err)
			continue
		}
		c.SetWriteDeadline(time.Now().Add(time.Minute))
		m.dial(t, exchange.PortRelease)
		if _, err := c.Write(make([]byte, total-sent)); err != nil {
			t.Errorf("write the rest after %d bytes, in pieces of %d: %v", sent, size, err)
			continue
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Errorf("read the answer after pieces of %d: %v", size, err)
		}
	}
}

// Connections leave nothing behind in the guest either, or this would run out
// of something.
func (m *machine) testManyShort(t *testing.T) {
	for range 300 {
		c, err := m.Dial(timeout(t), exchange.PortUpper)
		if err != nil {
			t.Fatal(err)
		}
		c.Write([]byte("a"))
		c.CloseWrite()
		if got, err := io.ReadAll(c); err != nil || string(got) != "A" {
			t.Fatalf("answer = %q, %v; want %q", got, err, "A")
		}
		c.Close()
	}
}

// A connection closed in the middle of a transfer does not disturb others.
func (m *machine) testAbandoned(t *testing.T) {
	for range 20 {
		c := m.dial(t, exchange.Port)
		if err := exchange.Request(c, exchange.Give, 10<<20); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 100<<10)); err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	echo(t, m.dial(t, exchange.Port), 3, 1<<20)
}

// The end of the machine ends everything, by itself.
func (m *machine) testEnd(t *testing.T) {
	c := m.dial(t, exchange.Port)
	if err := m.vm.Kill(timeout(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read after the machine's end: %v; want an error of the connection", err)
	}
	if m.Name() == vsock.VhostUser {
		if _, err := m.Dial(timeout(t), exchange.Port); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Dial after the machine's end: %v; want an error at once", err)
		}
		if _, err := m.Accept(timeout(t)); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Accept after the machine's end: %v; want an error at once", err)
		}
	}
}
