//go:build linux

package storage_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/podns/podnstest"
	"github.com/vmrt/vmrt/pkg/storage"
)

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
	return func() bool { return podnstest.Readable(t, watch) }
}
