//go:build linux

package storage_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/guest/initramfs"
	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/hypervisor/accel"
	"github.com/vmrt/vmrt/pkg/hypervisor/qemu"
	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/podns/podnstest"
	"github.com/vmrt/vmrt/pkg/storage"
	"github.com/vmrt/vmrt/pkg/vsock"
	"github.com/vmrt/vmrt/tests/platform"
)

// Limits for a machine that is busy with other tests.
const (
	bootLimit   = 3 * time.Minute
	answerLimit = time.Minute
)

// cached is how long the guest may go by what it has cached (cache=auto), with
// a margin.
const cached = 10 * time.Second

// missing skips a test of the virtual machine, unless it must run.
func missing(tb testing.TB, format string, args ...any) {
	tb.Helper()
	if os.Getenv("VMRT_REQUIRE_VM") == "1" {
		tb.Fatalf("VMRT_REQUIRE_VM=1, but: "+format, args...)
	}
	tb.Skipf(format, args...)
}

func short(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a virtual machine, which -short is without")
	}
}

// machine is a virtual machine with a share, which is mounted at /share.
type machine struct {
	tb     testing.TB
	ns     *podns.Namespaces
	share  *storage.Share
	daemon *storage.Daemon
	in     *json.Decoder
	out    *json.Encoder
}

// request and answer are those of testdata/guest.
type request struct {
	Op, Path, Data string
}

type answer struct {
	Errno      unix.Errno
	Data       string
	Names      []string
	Dev, Ino   uint64
	Nlink      uint64
	IsDir      bool
	Mode, Rdev uint64
}

// eachMachine runs f with a machine for each of the sandboxes.
func eachMachine(t *testing.T, sandboxes []storage.Sandbox, f func(t *testing.T, m *machine)) {
	short(t)
	binary, err := platform.Virtiofsd(storage.FindDaemon)
	if err != nil {
		missing(t, "%v", err)
	}
	for _, sandbox := range sandboxes {
		t.Run(string(sandbox), func(t *testing.T) {
			f(t, boot(t, storage.DaemonConfig{Binary: binary, Sandbox: sandbox}))
		})
	}
}

func boot(tb testing.TB, cfg storage.DaemonConfig) *machine {
	tb.Helper()
	kernel := "../../bin/guest/" + guest.Tuned + "/" + guest.KernelFile
	if path := os.Getenv("VMRT_TEST_KERNEL"); path != "" {
		kernel = path
	}
	if _, err := os.Stat(kernel); err != nil {
		missing(tb, "no guest kernel: %v; make kernel initramfs", err)
	}
	binary, err := platform.QEMU()
	if err != nil {
		missing(tb, "%v", err)
	}
	initrd := testInitrd(tb)
	m := &machine{tb: tb, ns: podnstest.Open(tb, podns.Config{})}
	ctx, cancel := context.WithTimeout(tb.Context(), bootLimit)
	defer cancel()
	if m.share, err = storage.NewShare(m.ns, tb.TempDir()); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { m.share.Close() })
	cfg.Share = m.share
	if m.daemon, err = storage.StartDaemon(ctx, m.ns, cfg); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { m.daemon.Close() })

	transport, err := vsock.Open(vsock.Auto)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { transport.Close() })
	accelerator, err := platform.Accelerator(ctx, accel.Config{})
	if err != nil {
		tb.Fatal(err)
	}
	var console bytes.Buffer
	vm, err := qemu.Launch(ctx, qemu.Config{
		Binary: binary, Start: m.ns.Start, CacheDir: tb.TempDir(),
		Console: func(line string) { fmt.Fprintln(&console, line) },
	}, hypervisor.Spec{
		Name: "storage-test", Accelerator: accelerator, CPUs: 1, MemoryMiB: 192,
		Kernel: kernel, Initrd: initrd,
		Vsock:   transport.Device(),
		Shares:  []hypervisor.Share{{Tag: "vmrt", Socket: m.daemon.Socket()}},
		Cmdline: []string{fmt.Sprintf("vmrt_test.port=%d", transport.HostPort())},
	})
	if err != nil {
		tb.Fatal(err)
	}
	m.daemon.CloseSocket()
	if f := transport.Device().Backend; f != nil {
		f.Close()
	}
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), bootLimit)
		defer cancel()
		if err := vm.Kill(ctx); err != nil {
			tb.Error(err)
		}
		podnstest.Receive(tb, "the daemon to end with the virtual machine", m.daemon.Done())
		if err := m.daemon.Err(); err != nil {
			tb.Errorf("the daemon ended with %v; want nil", err)
		}
		if tb.Failed() {
			tb.Logf("console:\n%s", &console)
		}
	})
	go func() {
		select {
		case <-vm.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	conn, err := transport.Accept(ctx)
	if err != nil {
		tb.Fatalf("no guest: %v; machine %v, daemon %v", err, vm.Err(), m.daemon.Err())
	}
	tb.Cleanup(func() { conn.Close() })
	m.in, m.out = json.NewDecoder(conn), json.NewEncoder(conn)
	if a := m.ask("mount", "/share", "vmrt"); a.Errno != 0 {
		tb.Fatalf("mount the share: %v", a.Errno)
	}
	return m
}

func (m *machine) ask(op, path, data string) answer {
	m.tb.Helper()
	done := time.AfterFunc(answerLimit, func() { m.daemon.Close() }) // ends the guest's wait
	defer done.Stop()
	if err := m.out.Encode(request{op, path, data}); err != nil {
		m.tb.Fatal(err)
	}
	var a answer
	if err := m.in.Decode(&a); err != nil {
		m.tb.Fatalf("guest: %s %s: %v", op, path, err)
	}
	return a
}

// want asks and fails the test unless the answer has the error number.
func (m *machine) want(errno unix.Errno, op, path, data string) answer {
	m.tb.Helper()
	a := m.ask(op, path, data)
	if a.Errno != errno {
		m.tb.Errorf("guest: %s %s %.40s = %q; want %q", op, path, data, a.Errno.Error(), errno.Error())
	}
	return a
}

// read wants a file to have some content.
func (m *machine) read(path, want string) {
	m.tb.Helper()
	if a := m.want(0, "read", path, ""); a.Data != want {
		m.tb.Errorf("guest: %s = %q; want %q", path, a.Data, want)
	}
}

// soon repeats what asks the guest until it is true or caches have expired.
func (m *machine) soon(what string, ok func() bool) {
	m.tb.Helper()
	start := time.Now()
	for tries := 1; !ok(); tries++ {
		// Tries count too: on a busy machine one may take seconds.
		if passed := time.Since(start); passed > cached && tries > 100 {
			m.tb.Errorf("after %v and %d tries the guest does not see %s", passed, tries, what)
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (m *machine) bind(source string, o storage.BindOptions) (guest string) {
	m.tb.Helper()
	e, err := m.share.AddBind("web", source, o)
	if err != nil {
		m.tb.Fatal(err)
	}
	return "/share/" + e.Share
}

// testInitrd returns an initramfs with testdata/guest as init.
func testInitrd(tb testing.TB) string {
	tb.Helper()
	program, err := buildGuest()
	if err != nil {
		tb.Fatal(err)
	}
	var a initramfs.Archive
	err = errors.Join(
		a.Dir("dev", 0o755),
		a.CharDevice("dev/console", 0o600, 5, 1),
		a.File("init", 0o755, program),
	)
	if err != nil {
		tb.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := a.WriteTo(&b); err != nil {
		tb.Fatal(err)
	}
	path := filepath.Join(tb.TempDir(), "initrd")
	if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
		tb.Fatal(err)
	}
	return path
}

var buildGuest = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "vmrt-test-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	program, err := platform.Build("pkg/storage/testdata/guest", dir)
	if err != nil {
		return nil, err
	}
	return os.ReadFile(program)
})
