//go:build linux

package storage_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/google/go-cmp/cmp"
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

// eachMachine runs f with a machine for each virtiofsd in the sandboxes.
func eachMachine(t *testing.T, sandboxes []storage.Sandbox, f func(t *testing.T, m *machine)) {
	short(t)
	binary, err := storage.FindDaemon()
	if err != nil {
		missing(t, "%v", err)
	}
	binaries := append([]string{binary}, filepath.SplitList(os.Getenv("VMRT_TEST_VIRTIOFSD"))...)
	for _, binary := range binaries {
		for _, sandbox := range sandboxes {
			t.Run(filepath.Base(binary)+" in "+string(sandbox), func(t *testing.T) {
				f(t, boot(t, storage.DaemonConfig{Binary: binary, Sandbox: sandbox}))
			})
		}
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
	binary, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		missing(tb, "no QEMU: %v", err)
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
	chosen, err := accel.Choose(ctx, hypervisor.Auto, accel.Config{})
	if err != nil {
		tb.Fatal(err)
	}
	var console bytes.Buffer
	vm, err := qemu.Launch(ctx, qemu.Config{
		Binary: binary, Start: m.ns.Start, CacheDir: tb.TempDir(),
		Console: func(line string) { fmt.Fprintln(&console, line) },
	}, hypervisor.Spec{
		Name: "storage-test", Accelerator: chosen.Accelerator, CPUs: 1, MemoryMiB: 192,
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

func put(tb testing.TB, path, content string) string {
	tb.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		tb.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		tb.Fatal(err)
	}
	return path
}

func wantFile(tb testing.TB, path, want string) {
	tb.Helper()
	if b, err := os.ReadFile(path); string(b) != want || err != nil {
		tb.Errorf("%s on the host = %q, %v; want %q", path, b, err, want)
	}
}

// overlay returns a root file system in dir whose one layer has file.
func overlay(tb testing.TB, dir, file string) mount.Mount {
	tb.Helper()
	put(tb, filepath.Join(dir, "lower", file), "of the image")
	for _, d := range []string{"upper", "work"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			tb.Fatal(err)
		}
	}
	return mount.Mount{Type: "overlay", Source: "overlay", Options: []string{
		"lowerdir=" + dir + "/lower", "upperdir=" + dir + "/upper", "workdir=" + dir + "/work",
	}}
}

// Everything in this test is added when the guest has booted and mounted the
// share.
func TestVMSeesWhatIsAdded(t *testing.T) {
	eachMachine(t, []storage.Sandbox{storage.SandboxNamespace, storage.SandboxChroot}, func(t *testing.T, m *machine) {
		dir := t.TempDir()
		m.testFolder(dir)
		m.testFile(filepath.Join(dir, "a"))
		m.testReadOnly(dir)
		m.testRootfs()
		m.testInodes()
		m.testSharedFolder()
	})
}

func (m *machine) testFolder(dir string) {
	put(m.tb, dir+"/a", "one")
	g := m.bind(dir, storage.BindOptions{})
	m.read(g+"/a", "one")
	put(m.tb, dir+"/later", "made on the host")
	m.read(g+"/later", "made on the host")
	put(m.tb, dir+"/a", "changed on the host")
	m.soon("a change on the host", func() bool { return m.ask("read", g+"/a", "").Data == "changed on the host" })
	m.want(0, "write", g+"/a", "changed in the guest")
	wantFile(m.tb, dir+"/a", "changed in the guest")
	m.want(0, "mkdir", g+"/made", "")
	m.want(0, "write", g+"/made/x", "made in the guest")
	wantFile(m.tb, dir+"/made/x", "made in the guest")
	m.want(0, "link", g+"/made/y", g+"/made/x")
	if a := m.want(0, "stat", g+"/made/y", ""); a.Nlink != 2 {
		m.tb.Errorf("guest: link count of a hard link = %d; want 2", a.Nlink)
	}
	m.want(0, "chown", g+"/made/x", "")
	var st unix.Stat_t
	if err := unix.Stat(dir+"/made/x", &st); err != nil || st.Uid != 1234 || st.Gid != 4321 {
		m.tb.Errorf("owner on the host = %d:%d, %v; want 1234:4321", st.Uid, st.Gid, err)
	}
	if err := os.Remove(dir + "/later"); err != nil {
		m.tb.Fatal(err)
	}
	m.soon("a removal on the host", func() bool { return m.ask("stat", g+"/later", "").Errno == unix.ENOENT })
}

func (m *machine) testFile(file string) {
	put(m.tb, file, "one file")
	g := m.bind(file, storage.BindOptions{})
	m.read(g, "one file")
	m.want(0, "write", g, "from the guest")
	wantFile(m.tb, file, "from the guest")
	put(m.tb, file, "from the host")
	m.soon("a change of a file on the host", func() bool { return m.ask("read", g, "").Data == "from the host" })
	m.want(unix.ENOTDIR, "read", g+"/../a", "")
}

func (m *machine) testReadOnly(dir string) {
	for _, o := range []storage.BindOptions{{ReadOnly: true}, {Recursive: true, ReadOnlyRecursive: true}} {
		g := m.bind(dir, o)
		m.want(0, "read", g+"/a", "")
		m.want(unix.EROFS, "write", g+"/a", "")
		m.want(unix.EROFS, "remove", g+"/a", "")
		m.want(unix.EROFS, "mkdir", g+"/b", "")
		f := m.bind(filepath.Join(dir, "a"), o)
		m.want(unix.EROFS, "write", f, "")
	}
}

func (m *machine) testRootfs() {
	dir := m.tb.TempDir()
	e, err := m.share.AddRootfs("web", []mount.Mount{overlay(m.tb, dir, "etc/os-release")})
	if err != nil {
		m.tb.Fatal(err)
	}
	g := "/share/" + e.Share
	m.read(g+"/etc/os-release", "of the image")
	m.want(0, "write", g+"/etc/os-release", "copied up")
	wantFile(m.tb, dir+"/upper/etc/os-release", "copied up")
	wantFile(m.tb, dir+"/lower/etc/os-release", "of the image")
	m.want(0, "remove", g+"/etc/os-release", "")
	m.want(unix.ENOENT, "read", g+"/etc/os-release", "")
	m.want(0, "symlink", g+"/link", "/etc/passwd")
	m.want(0, "write", g+"/f", "")
	m.want(0, "setxattr", g+"/f", "user.key=value")
	if a := m.want(0, "getxattr", g+"/f", "user.key"); a.Data != "value" {
		m.tb.Errorf("guest: user.key = %q; want value", a.Data)
	}
	// A file capability, as images have: struct vfs_cap_data, version 2.
	capability := "\x01\x00\x00\x02" + "\x00\x04\x00\x00" + strings.Repeat("\x00", 12)
	m.want(0, "setxattr", g+"/f", "security.capability="+capability)
	if a := m.want(0, "getxattr", g+"/f", "security.capability"); a.Data != capability {
		m.tb.Errorf("guest: security.capability = %q; want %q", a.Data, capability)
	}
	if a := m.ask("setxattr", g+"/f", "trusted.overlay.opaque=y"); a.Errno == 0 {
		m.tb.Error("guest: it may set attributes of the host's overlay")
	}
	// A device file can be made, as in any image, and is nothing to the host.
	m.want(0, "mknod", g+"/null", "")
	if a := m.want(0, "stat", g+"/null", ""); a.Rdev != unix.Mkdev(1, 3) {
		m.tb.Errorf("guest: device number = %#x; want that of /dev/null", a.Rdev)
	}
}

// Two files of different file systems may have one inode number: they must not
// seem to be one.
func (m *machine) testInodes() {
	type id struct{ dev, ino uint64 }
	seen := map[id]string{}
	devs := map[uint64]bool{}
	for i := range 3 {
		dir := m.tb.TempDir()
		if err := unix.Mount("host", dir, "tmpfs", 0, "size=1m"); err != nil {
			m.tb.Fatal(err)
		}
		m.tb.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
		put(m.tb, dir+"/f", "")
		g := m.bind(dir, storage.BindOptions{})
		// Opening it mounts it, in the guest; lstat(2) alone does not.
		m.want(0, "list", g, "")
		for _, path := range []string{g, g + "/f"} {
			a := m.want(0, "stat", path, "")
			if other := seen[id{a.Dev, a.Ino}]; other != "" {
				m.tb.Errorf("guest: %s and %s are one file, %d:%d", path, other, a.Dev, a.Ino)
			}
			seen[id{a.Dev, a.Ino}] = path
		}
		in, top := m.want(0, "stat", g+"/f", ""), m.want(0, "stat", g, "")
		if in.Dev != top.Dev {
			m.tb.Errorf("guest: devices of a folder and a file in it = %#x, %#x; want one", top.Dev, in.Dev)
		}
		if devs[top.Dev] {
			m.tb.Errorf("guest: volume %d has the device of another", i)
		}
		devs[top.Dev] = true
	}
	if root := m.want(0, "stat", "/share", ""); devs[root.Dev] {
		m.tb.Error("guest: a volume has the device of the share")
	}
}

func (m *machine) testSharedFolder() {
	m.want(unix.EROFS, "write", "/share/x", "")
	m.want(unix.EROFS, "mkdir", "/share/web.1/x", "")
	a := m.want(0, "list", "/share", "")
	if diff := cmp.Diff([]string{"web.1"}, a.Names); diff != "" {
		m.tb.Errorf("the share in the guest (-want +got):\n%s", diff)
	}
}

func TestVMHundredBinds(t *testing.T) {
	short(t)
	m := boot(t, storage.DaemonConfig{})
	dir := t.TempDir()
	for i := range 100 {
		source := put(t, filepath.Join(dir, fmt.Sprint(i), "f"), fmt.Sprint("content ", i))
		file := ""
		if i%2 == 0 {
			source, file = filepath.Dir(source), "/f"
		}
		m.read(m.bind(source, storage.BindOptions{Recursive: true})+file, fmt.Sprint("content ", i))
	}
}

// A container that the guest has let go of is gone for the host: its file
// systems are unmounted, whatever virtiofsd had open.
func TestVMRemoveContainer(t *testing.T) {
	eachMachine(t, []storage.Sandbox{storage.SandboxNamespace}, func(t *testing.T, m *machine) {
		for _, how := range []string{"looking", "at once"} {
			t.Run(how, func(t *testing.T) { m.testRemoval(t, how) })
		}
	})
}

func (m *machine) testRemoval(t *testing.T, how string) {
	dir := t.TempDir()
	if err := unix.Mount("host", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	put(t, dir+"/a/b/f", "")
	volume := m.bind(dir, storage.BindOptions{})
	m.read(volume+"/a/b/f", "")
	gone := watchUnmount(t, dir)
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if err := m.share.RemoveContainer("web"); err != nil {
		t.Fatal(err)
	}
	container := filepath.Dir(filepath.Dir(volume))
	switch how {
	case "looking":
		m.soon("the removal", func() bool { return m.ask("stat", container, "").Errno == unix.ENOENT })
	case "at once":
		// A create looks whether the name exists, caches or not, and is
		// then refused by the read-only share.
		m.want(unix.EROFS, "mkdir", container, "")
		m.want(unix.ENOENT, "stat", container, "")
	}
	if !gone() {
		t.Error("the volume's file system is still mounted somewhere")
	}
	if a := m.ask("list", "/share", ""); len(a.Names) != 0 {
		t.Errorf("the share in the guest = %q; want nothing", a.Names)
	}
	// The same container once more.
	put(t, dir+"/f", "again")
	m.read(m.bind(dir, storage.BindOptions{})+"/f", "again")
	if err := m.share.RemoveContainer("web"); err != nil {
		t.Fatal(err)
	}
}

// watchUnmount returns a function that waits for the end of the file system at
// dir in all mount namespaces, and reports whether it came.
func watchUnmount(t *testing.T, dir string) func() bool {
	t.Helper()
	watch, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(watch) })
	if _, err := unix.InotifyAddWatch(watch, dir, unix.IN_UNMOUNT); err != nil {
		t.Fatal(err)
	}
	return func() bool {
		poll := []unix.PollFd{{Fd: int32(watch), Events: unix.POLLIN}}
		n, _ := unix.Poll(poll, int(answerLimit.Milliseconds()))
		return n == 1
	}
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
	cmd := exec.Command("go", "build", "-ldflags=-s -w", "-o", dir+"/guest", "./testdata/guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build testdata/guest: %w\n%s", err, out)
	}
	return os.ReadFile(dir + "/guest")
})
