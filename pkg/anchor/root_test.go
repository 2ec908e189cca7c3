//go:build linux

package anchor

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/podns/podnstest"
)

// sameFile reports whether two paths name the same file, seen from the host.
func sameFile(t *testing.T, a, b string) bool {
	t.Helper()
	fa, err := os.Stat(a)
	if err != nil {
		t.Fatal(err)
	}
	fb, err := os.Stat(b)
	if err != nil {
		t.Fatal(err)
	}
	return os.SameFile(fa, fb)
}

func TestRoot(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{})
	root := rootfs(t, "etc/passwd")
	a := start(t, ns, Config{Root: root})
	for _, link := range []string{"root", "cwd", "root/..", "cwd/../.."} {
		if sameFile(t, a.file(link), "/") || !sameFile(t, a.file(link), root) {
			t.Errorf("%s is not the container's root", link)
		}
	}
	// What `nerdctl cp` does, in both directions.
	if got := read(t, a.file("root/etc/passwd")); got != "of the image" {
		t.Errorf("file below the root = %q", got)
	}
	if err := os.WriteFile(a.file("root/new"), []byte("from the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := read(t, filepath.Join(root, "new")); got != "from the host" {
		t.Errorf("file written below the root = %q", got)
	}
	// Who enters the mount namespace finds nothing else.
	if mounts := podnstest.Mounts(t, a.file("")); len(mounts) != 1 {
		t.Errorf("mounts = %q; want the root alone", mounts)
	}
	err := a.proc.InMounts(func() error {
		entries, err := os.ReadDir("/")
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		if diff := cmp.Diff([]string{"etc", "new"}, names); diff != "" {
			t.Errorf("root of the mount namespace (-want +got):\n%s", diff)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// The root file system is one that is mounted in the pod only.
func TestRootInThePod(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{})
	root := t.TempDir()
	err := ns.Do(t.Context(), func() error {
		if err := unix.Mount("pod", root, "tmpfs", 0, "size=1m"); err != nil {
			return err
		}
		// As in a shared folder: changes of the anchor must not come back.
		if err := unix.Mount("", root, "", unix.MS_SHARED, ""); err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(root, "f"), []byte("in the pod"), 0o644)
	})
	if err != nil {
		t.Fatal(err)
	}
	var before, after []string
	mounts := func(m *[]string) {
		_ = ns.Do(t.Context(), func() error { *m = podnstest.Mounts(t, "/proc/thread-self"); return nil })
	}
	mounts(&before)
	a := start(t, ns, Config{Root: root, Binds: []Bind{{Source: root + "/f", Target: "/f"}}})
	if got := read(t, a.file("root/f")); got != "in the pod" {
		t.Errorf("file below the root = %q; want that of the pod's mount", got)
	}
	mounts(&after)
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("the anchor changed the pod's mounts (-before +after):\n%s", diff)
	}
	a.Close()
	mounts(&after)
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("the anchor's end changed the pod's mounts (-before +after):\n%s", diff)
	}
}

func TestBinds(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{})
	host := rootfs(t, "dir/f", "file", "secret")
	mark := func(path string) { // a file that can only be the host's
		if err := os.WriteFile(path, []byte("of the host"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	mark(host + "/dir/f")
	mark(host + "/file")
	outside := rootfs(t, "victim")
	root := rootfs(t, "data/f", "conf", "nested/sub/f", "real/f")
	for name, target := range map[string]string{
		"escape":   outside,             // absolute: stays in the root, where it is missing
		"dots":     "../../../../../..", // the root itself
		"inside":   "/real",
		"loop":     "loop",
		"magic":    "/proc/self/root",
		"filelink": outside + "/victim",
	} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	dir, file := host+"/dir", host+"/file"
	a := start(t, ns, Config{Root: root, Binds: []Bind{
		{Source: dir, Target: "/data"},
		{Source: file, Target: "conf"},
		{Source: dir, Target: "/nested"},
		{Source: dir, Target: "/nested/sub"}, // hidden by the one before
		{Source: dir, Target: "/inside"},
		{Source: dir, Target: "/escape"},
		{Source: dir, Target: "/magic"},
		{Source: dir, Target: "/loop"},
		{Source: file, Target: "/filelink"},
		{Source: file, Target: "/dots" + outside + "/victim"},
		{Source: file, Target: "/real"}, // a file on a folder
		{Source: dir, Target: "/conf"},  // a folder on a file
		{Source: dir, Target: "/missing"},
		{Source: dir, Target: ""},
		{Source: dir, Target: "/"},
		{Source: dir, Target: "/dots"}, // the root by another name
	}})
	for path, want := range map[string]string{
		"data/f":        "of the host",
		"conf":          "of the host",
		"nested/f":      "of the host",
		"real/f":        "of the host", // through the link named inside
		"etc/../data/f": "",
	} {
		b, err := os.ReadFile(a.file("root/" + path))
		if want != "" && (string(b) != want || err != nil) {
			t.Errorf("%s = %q, %v; want %q", path, b, err, want)
		}
	}
	if got, want := len(podnstest.Mounts(t, a.file(""))), 5; got != want {
		t.Errorf("%d mounts; want the root and 4 volumes: %q", got, podnstest.Mounts(t, a.file("")))
	}
	if got := read(t, outside+"/victim"); got != "of the image" {
		t.Errorf("a file outside the root = %q", got)
	}
	if got := read(t, root+"/data/f"); got != "of the image" {
		t.Errorf("file below the root, seen from the host = %q; want no volume on it", got)
	}
}

// Volumes may come, and their mount points be made, after the start.
func TestBindLater(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{})
	root, volume := rootfs(t), t.TempDir()
	a := start(t, ns, Config{Root: root})
	if err := os.Mkdir(filepath.Join(root, "data"), 0o755); err != nil {
		t.Fatal(err)
	}
	var before, after []string
	err := ns.Do(t.Context(), func() error {
		err := unix.Mount("pod", volume, "tmpfs", 0, "size=1m")
		err = errors.Join(err, unix.Mount("", volume, "", unix.MS_SHARED, ""))
		before = podnstest.Mounts(t, "/proc/thread-self")
		return errors.Join(err, os.WriteFile(filepath.Join(volume, "f"), []byte("in the pod"), 0o644))
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Bind(ns, Bind{Source: volume, Target: "/data"}, Bind{Source: volume + "/f", Target: "/data/f"}); err != nil {
		t.Fatal(err)
	}
	if got := read(t, a.file("root/data/f")); got != "in the pod" {
		t.Errorf("file in the volume = %q; want that of the pod", got)
	}
	if mounts := podnstest.Mounts(t, a.file("")); len(mounts) != 3 {
		t.Errorf("mounts = %q; want the root, the volume and the file", mounts)
	}
	if strings.Contains(read(t, a.file("mountinfo")), "shared:") {
		t.Errorf("the anchor has shared mounts:\n%s", read(t, a.file("mountinfo")))
	}
	_ = ns.Do(t.Context(), func() error { after = podnstest.Mounts(t, "/proc/thread-self"); return nil })
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("the anchor changed the pod's mounts (-before +after):\n%s", diff)
	}
	if err := a.Bind(ns, Bind{Source: "/nonexistent", Target: "/data"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Bind(missing source) = %v; want %v", err, os.ErrNotExist)
	}
	a.Close()
	if err := a.Bind(ns, Bind{Source: volume, Target: "/data"}); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("Bind after Close = %v; want %v", err, os.ErrProcessDone)
	}
	ns.Close()
	if err := a.Bind(ns, Bind{Source: volume, Target: "/data"}); !errors.Is(err, podns.ErrClosed) {
		t.Errorf("Bind in a closed pod = %v; want %v", err, podns.ErrClosed)
	}
}

// A root that is a symbolic link would have been placed by somebody else.
func TestRootIsNotFollowed(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{})
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("/", link); err != nil {
		t.Fatal(err)
	}
	if a, err := Start(ns, Config{Root: link}); err == nil {
		a.Close()
		t.Error("Start(link to /) = nil; want an error")
	}
}
