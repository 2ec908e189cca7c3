//go:build linux

package storage

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/idmap"
)

// shifted maps root and what follows to other users than groups.
var shifted = idmap.Mapping{
	UIDs: []specs.LinuxIDMapping{{ContainerID: 0, HostID: 1000, Size: 10}},
	GIDs: []specs.LinuxIDMapping{{ContainerID: 0, HostID: 2000, Size: 10}},
}

// owner returns those of a file in the pod's mount namespace.
func (p *pod) owner(path string) (ids [2]uint32) {
	p.t.Helper()
	p.inside(func() error {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			p.t.Error(err)
		}
		ids = [2]uint32{st.Uid, st.Gid}
		return nil
	})
	return ids
}

// create makes a file in the pod's mount namespace, as virtiofsd does it for a
// user of the guest (setfsuid(2)).
func (p *pod) create(path string, uid, gid int) {
	p.t.Helper()
	p.inside(func() error {
		dir, err := os.OpenFile(filepath.Dir(path), unix.O_PATH, 0) // whose parents are root's
		if err != nil {
			p.t.Error(err)
			return nil
		}
		defer dir.Close()
		unix.SetfsgidRetGid(gid)
		unix.SetfsuidRetUid(uid)
		fd, err := unix.Openat(int(dir.Fd()), filepath.Base(path), unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		unix.SetfsuidRetUid(0)
		unix.SetfsgidRetGid(0)
		if err != nil {
			p.t.Errorf("make %s: %v", path, err)
			return nil
		}
		unix.Close(fd)
		return nil
	})
}

func hostOwner(t *testing.T, path string) [2]uint32 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return [2]uint32{st.Uid, st.Gid}
}

// openDir is a folder that everybody may write to.
func openDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestIDMappedBind(t *testing.T) {
	dir := openDir(t)
	write(t, filepath.Join(dir, "root"), "")
	write(t, filepath.Join(dir, "three"), "")
	write(t, filepath.Join(dir, "stranger"), "")
	for name, id := range map[string]int{"three": 3, "stranger": 5000} {
		if err := os.Chown(filepath.Join(dir, name), id, id); err != nil {
			t.Fatal(err)
		}
	}
	below := filepath.Join(dir, "below")
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	// A mount of the same file system: not every one can be id-mapped.
	other := t.TempDir()
	write(t, filepath.Join(other, "file"), "")
	if err := unix.Mount(other, below, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(below, 0); err != nil {
			t.Error(err)
		}
	})

	p := newPod(t)
	if _, err := p.AddBind("probe", dir, BindOptions{IDs: shifted}); errors.Is(err, unix.EINVAL) || errors.Is(err, errors.ErrUnsupported) {
		t.Skipf("needs a temporary folder that can be id-mapped: %v", err)
	}
	for _, tt := range []struct {
		recursive bool
		below     [2]uint32
	}{{false, [2]uint32{0, 0}}, {true, [2]uint32{1000, 2000}}} {
		e := p.bind("web", dir, BindOptions{Recursive: true, IDs: shifted, RecursiveIDs: tt.recursive})
		for name, want := range map[string][2]uint32{
			"root": {1000, 2000}, "three": {1003, 2003}, "stranger": {65534, 65534}, "below/file": tt.below,
		} {
			if got := p.owner(filepath.Join(e.Host, name)); got != want {
				t.Errorf("recursive %v: owner of %s = %v; want %v", tt.recursive, name, got, want)
			}
		}
		p.create(filepath.Join(e.Host, "made"), 1004, 2005)
		if got := hostOwner(t, filepath.Join(dir, "made")); got != [2]uint32{4, 5} {
			t.Errorf("owner of a file made by 1004:2005 = %v on the host; want 4:5", got)
		}
		if err := os.Remove(filepath.Join(dir, "made")); err != nil {
			t.Fatal(err)
		}
	}
	file := p.bind("web", filepath.Join(dir, "three"), BindOptions{IDs: shifted, ReadOnly: true})
	if got := p.owner(file.Host); got != [2]uint32{1003, 2003} {
		t.Errorf("owner of a file by itself = %v; want 1003:2003", got)
	}
	if got := hostOwner(t, filepath.Join(dir, "three")); got != [2]uint32{3, 3} {
		t.Errorf("owner on the host = %v; want it unchanged, 3:3", got)
	}
}

// TestIDMappedRootfs: lower layers are mapped; the upper one has the ids that
// are seen, as containerd makes it.
func TestIDMappedRootfs(t *testing.T) {
	dir := t.TempDir()
	snap := snapshot(t, dir, 2)
	if err := errors.Join(os.Chown(filepath.Join(dir, "own", "fs"), 1000, 2000), os.Chmod(filepath.Join(dir, "own", "fs"), 0o777)); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(filepath.Join(dir, "1", "fs", "f1"), 7, 8); err != nil {
		t.Fatal(err)
	}
	snap.Options = append(snap.Options, "uidmap=0:1000:10", "gidmap=0:2000:10")
	p := newPod(t)
	e := p.rootfs("web", snap)
	for name, want := range map[string][2]uint32{".": {1000, 2000}, "f0": {1000, 2000}, "f1": {1007, 2008}, "all": {1000, 2000}} {
		if got := p.owner(filepath.Join(e.Host, name)); got != want {
			t.Errorf("owner of %s = %v; want %v", name, got, want)
		}
	}
	p.create(filepath.Join(e.Host, "made"), 1002, 2003)
	if got := hostOwner(t, filepath.Join(dir, "own", "fs", "made")); got != [2]uint32{1002, 2003} {
		t.Errorf("owner of a new file in the upper layer = %v; want 1002:2003", got)
	}

	bound := p.rootfs("bound", mount.Mount{Type: "bind", Source: filepath.Join(dir, "1", "fs"),
		Options: []string{"rbind", "rw", "uidmap=0:1000:10", "gidmap=0:2000:10"}})
	if got := p.owner(filepath.Join(bound.Host, "f1")); got != [2]uint32{1007, 2008} {
		t.Errorf("owner in a bind mount = %v; want 1007:2008", got)
	}
}

func TestIDMapErrors(t *testing.T) {
	p := newPod(t)
	// proc cannot be mounted so (no FS_ALLOW_IDMAP in fs/proc/root.c).
	_, err := p.AddBind("web", "/proc/sys", BindOptions{IDs: shifted})
	if !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "/proc/sys: id-mapped mount: the file system cannot be mounted so") {
		t.Errorf("id-mapped bind of /proc/sys = %v; want that proc cannot be", err)
	}
	p.legacy = true
	_, err = p.AddBind("web", t.TempDir(), BindOptions{IDs: shifted})
	if !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "Linux 5.12") {
		t.Errorf("id-mapped bind on an old kernel = %v; want that it needs a newer one", err)
	}
}
