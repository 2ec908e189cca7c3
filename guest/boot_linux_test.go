package guest_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/guest/initramfs"
	"github.com/vmrt/vmrt/guest/internal/report"
	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/hypervisor/qemu"
	"github.com/vmrt/vmrt/pkg/storage"
	"github.com/vmrt/vmrt/pkg/vsock"
	"github.com/vmrt/vmrt/tests/platform"
)

// builtDir is where make puts the guest files; VMRT_TEST_GUEST names another
// folder with the same in it.
func builtDir() string {
	if dir := os.Getenv("VMRT_TEST_GUEST"); dir != "" {
		return dir
	}
	return "../bin/guest"
}

// bootLimit bounds a boot on a machine that is busy with other tests.
const bootLimit = 3 * time.Minute

// TestBootKinds boots both kernels with their own initramfs, init replaced by a
// probe, and looks at what the probe found.
func TestBootKinds(t *testing.T) {
	for _, kind := range []string{guest.Tuned, guest.Stock} {
		t.Run(kind, func(t *testing.T) {
			m := newMachine(t, kind)
			m.share(t)
			r := m.report(t)
			if kind == guest.Tuned { // the others load modules when asked to
				checkXtables(t, r)
			} else if got := r.Works["trylock"]; !strings.Contains(got, "splice of an empty pipe: invalid argument") {
				t.Errorf("trylock: %q; want a flag that only the tuned kernel has", got)
			} else {
				delete(r.Works, "trylock")
			}
			checkReport(t, r)
			manifest, err := guest.Load(m.dir)
			if err != nil {
				t.Fatal(err)
			}
			if r.Release != manifest.Kernel.Release {
				t.Errorf("uname -r = %q; want %q from the manifest", r.Release, manifest.Kernel.Release)
			}
			if got, err := os.ReadFile(filepath.Join(m.folder, "answer")); err != nil || string(got) != "42" {
				t.Errorf("file from the guest = %q, %v; want 42", got, err)
			}
		})
	}
}

func checkReport(t *testing.T, r *report.Report) {
	t.Helper()
	for file, reason := range r.Boot {
		t.Errorf("boot module %s: %s", file, reason)
	}
	for file, reason := range r.Late {
		if file != "ptp_kvm.ko" { // needs KVM
			t.Errorf("late module %s: %s", file, reason)
		}
	}
	for what, reason := range r.Works {
		if reason != "" {
			t.Errorf("%s: %s; want it to work", what, reason)
		}
	}
	// Types of section 5 of the virtio specification.
	for device, want := range map[string]string{"0x0013": "vmw_vsock_virtio_transport", "0x001a": "virtiofs"} {
		if got := r.Drivers[device]; got != want {
			t.Errorf("driver of virtio device %s = %q; want %q", device, got, want)
		}
	}
	for _, fs := range []string{"cgroup2", "erofs", "ext4", "overlay", "tmpfs", "virtiofs"} {
		if !slices.Contains(r.FileSystems, fs) {
			t.Errorf("file system %s is missing", fs)
		}
	}
	for _, c := range []string{"cpu", "cpuset", "hugetlb", "io", "memory", "pids"} {
		if !slices.Contains(r.Controllers, c) {
			t.Errorf("cgroup controller %s is missing", c)
		}
	}
	if r.CPUs != 2 {
		t.Errorf("%d CPUs; want 2", r.CPUs)
	}
	if r.Clock != "tsc" && r.Clock != "kvm-clock" {
		t.Errorf("clock source %q; want tsc or kvm-clock", r.Clock)
	}
}

// checkXtables looks for what service meshes, kube-proxy and VPN sidecars do with
// iptables.
func checkXtables(t *testing.T, r *report.Report) {
	t.Helper()
	for _, family := range []string{"ip", "ip6"} {
		for what, names := range map[string]string{
			"targets": "REDIRECT TPROXY MASQUERADE DNAT SNAT NETMAP REJECT LOG NFLOG NFQUEUE MARK CONNMARK CT SET TCPMSS DSCP CLASSIFY",
			"matches": "conntrack state owner addrtype multiport comment set mark connmark statistic limit hashlimit connlimit " +
				"recent socket cgroup bpf ipvs physdev policy string u32 mac length time tcp udp icmp rpfilter",
		} {
			file := family + "_tables_" + what
			for name := range strings.FieldsSeq(names) {
				if family == "ip6" && name == "icmp" {
					name = "icmp6"
				}
				if !slices.Contains(r.Xtables[file], name) {
					t.Errorf("%s has no %s", file, name)
				}
			}
		}
	}
}

// BenchmarkBoot measures from the start of QEMU to the first line of init.
func BenchmarkBoot(b *testing.B) {
	for _, kind := range []string{guest.Tuned, guest.Stock} {
		b.Run(kind, func(b *testing.B) {
			var times []time.Duration
			for b.Loop() {
				m := newMachine(b, kind)
				m.report(b)
				times = append(times, m.console.marked.Sub(m.started))
			}
			slices.Sort(times)
			b.ReportMetric(float64(times[len(times)/2].Milliseconds()), "ms-to-init")
		})
	}
}

// skip skips the test for what the machine lacks, unless it must run.
func skip(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("VMRT_REQUIRE_VM") == "1" {
		t.Fatalf("VMRT_REQUIRE_VM=1, but: "+format, args...)
	}
	t.Skipf(format, args...)
}

// machine is a virtual machine that is about to start.
type machine struct {
	binary    string // QEMU
	dir       string // of guest files
	folder    string // that the guest shares
	spec      hypervisor.Spec
	transport vsock.Transport
	console   console
	started   time.Time
}

func newMachine(t testing.TB, kind string) *machine {
	t.Helper()
	m := &machine{dir: filepath.Join(builtDir(), kind)}
	if _, err := os.Stat(filepath.Join(m.dir, guest.ManifestFile)); err != nil {
		skip(t, "no %s guest files: %v; make kernel initramfs", kind, err)
	}
	var err error
	if m.binary, err = platform.QEMU(); err != nil {
		skip(t, "%v", err)
	}
	if m.transport, err = vsock.Open(vsock.Auto); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.transport.Close() })
	m.spec = hypervisor.Spec{
		Name: "probe", Accelerator: hypervisor.TCG, CPUs: 2, MemoryMiB: 192,
		CmdlineDevices: guest.CmdlineDevices(kind),

		Kernel:  filepath.Join(m.dir, guest.KernelFile),
		Initrd:  initrd(t, filepath.Join(m.dir, guest.InitramfsFile)),
		Vsock:   m.transport.Device(),
		Cmdline: []string{report.PortArg + strconv.FormatUint(uint64(m.transport.HostPort()), 10)},
	}
	return m
}

// initrd returns a copy of an initramfs with the probe in place of init: of two
// archives one behind the other, the kernel lets the second overwrite.
func initrd(t testing.TB, shipped string) string {
	t.Helper()
	data, err := os.ReadFile(shipped)
	if err != nil {
		t.Fatal(err)
	}
	var a initramfs.Archive
	if err := a.File("init", 0o755, probe(t)); err != nil {
		t.Fatal(err)
	}
	b := bytes.NewBuffer(data)
	if _, err := a.WriteTo(b); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// probe returns the probe program, which is built once.
func probe(t testing.TB) []byte {
	t.Helper()
	program, err := buildProbe()
	if err != nil {
		t.Fatal(err)
	}
	return program
}

var buildProbe = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "vmrt-probe-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	program, err := platform.Build("guest/internal/probe", dir)
	if err != nil {
		return nil, err
	}
	return os.ReadFile(program)
})

// share gives the machine a virtio-fs device on a folder of the test's.
func (m *machine) share(t *testing.T) {
	t.Helper()
	daemon, err := platform.Virtiofsd(storage.FindDaemon)
	if err != nil {
		skip(t, "%v", err)
	}
	if os.Geteuid() != 0 {
		skip(t, "virtiofsd needs root")
	}
	m.folder = t.TempDir()
	if err := os.WriteFile(filepath.Join(m.folder, "question"), []byte("42"), 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "fs")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	listener, err := l.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	// Both virtiofsd, in C and in Rust, know these arguments.
	cmd := exec.Command(daemon, "--fd=3", "-o", "source="+m.folder, "-o", "sandbox=chroot")
	cmd.ExtraFiles = []*os.File{listener}
	cmd.Stderr = &bytes.Buffer{}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended with its socket
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("virtiofsd: %s", cmd.Stderr)
		}
	})
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	socket, err := conn.(*net.UnixConn).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.Close() })
	m.spec.Shares = []hypervisor.Share{{Tag: report.Tag, Socket: socket}}
}

// report starts the machine and returns what the probe sends.
func (m *machine) report(t testing.TB) *report.Report {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), bootLimit)
	defer cancel()
	// QEMU ends with the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	m.started = time.Now()
	vm, err := qemu.Launch(ctx, qemu.Config{
		Binary: m.binary, CacheDir: t.TempDir(), Console: m.console.line,
	}, m.spec)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), bootLimit)
		defer cancel()
		if err := vm.Kill(ctx); err != nil {
			t.Error(err)
		}
	}()
	if f := m.spec.Vsock.Backend; f != nil {
		f.Close()
	}
	go func() {
		select {
		case <-vm.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	conn, err := m.transport.Accept(ctx)
	if err != nil {
		t.Fatalf("no report: %v, %v; console:\n%s", err, vm.Err(), m.console.text())
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(bootLimit)); err != nil {
		t.Fatal(err)
	}
	var r report.Report
	if err := json.NewDecoder(io.LimitReader(conn, 1<<20)).Decode(&r); err != nil {
		t.Fatalf("decode report: %v; console:\n%s", err, m.console.text())
	}
	return &r
}

// console keeps what the guest prints.
type console struct {
	mu     sync.Mutex
	lines  []string  // guarded by mu
	marked time.Time // of report.Mark; guarded by mu
}

func (c *console) line(s string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lines = append(c.lines, s)
	if strings.Contains(s, report.Mark) {
		c.marked = time.Now()
	}
}

func (c *console) text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(c.lines, "\n")
}
