package fsmount

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
)

// inNamespace runs f in a mount namespace of its own, on a thread that ends
// with it. f gets a folder that is the root for mounts.
func inNamespace(t *testing.T, f func(t *testing.T, root string)) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	root := t.TempDir()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends here
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			t.Errorf("make a mount namespace: %v", err)
			return
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Errorf("make mounts private: %v", err)
			return
		}
		if err := unix.Mount("tmpfs", root, "tmpfs", 0, ""); err != nil {
			t.Errorf("mount a tmpfs: %v", err)
			return
		}
		f(t, root)
	}()
	<-done
}

// write makes a file below dir; mounts are of the thread, so paths are safe.
func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Error(err)
	}
}

func content(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// mounted counts the mounts below path of this thread.
func mounted(t *testing.T, path string) (n int) {
	t.Helper()
	b, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		t.Error(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], path+"/") {
			n++
		}
	}
	return n
}

func TestMountKinds(t *testing.T) {
	inNamespace(t, func(t *testing.T, root string) {
		write(t, root+"/src/dir/a", "a")
		write(t, root+"/src/file", "file")
		write(t, root+"/lower1/x", "1")
		write(t, root+"/lower2/y", "2")
		err := Mount(root, []*api.MountSpec{
			{Type: "tmpfs", Source: "tmpfs", Target: root + "/new/tmp", Options: []string{"size=1m", "mode=0700", "nosuid"}},
			{Type: "bind", Source: root + "/src/dir", Target: root + "/new/dir", Options: []string{"rbind", "rprivate"}},
			{Type: "none", Source: root + "/src/file", Target: root + "/new/deep/file", Options: []string{"bind", "ro"}},
			{Type: "overlay", Source: "overlay", Target: root + "/new/overlay", Options: []string{
				"lowerdir=" + root + "/lower1:" + root + "/lower2", "upperdir=" + root + "/up/u", "workdir=" + root + "/up/w"}},
		})
		if err != nil {
			t.Errorf("Mount() = %v", err)
			return
		}
		for path, want := range map[string]string{
			"/new/dir/a": "a", "/new/deep/file": "file", "/new/overlay/x": "1", "/new/overlay/y": "2",
		} {
			if got := content(root + path); got != want {
				t.Errorf("%s = %q; want %q", path, got, want)
			}
		}
		if err := os.WriteFile(root+"/new/deep/file", nil, 0); !errors.Is(err, unix.EROFS) {
			t.Errorf("write to a read-only bind = %v; want EROFS", err)
		}
		write(t, root+"/new/overlay/z", "3")
		if got := content(root + "/up/u/z"); got != "3" {
			t.Errorf("upper directory's z = %q; want 3", got)
		}
		targets := []string{root + "/new/overlay", root + "/new/deep/file", root + "/new/dir", root + "/new/tmp"}
		for range 2 { // the second time nothing is mounted
			if err := Unmount(root, append(targets, root+"/never/there")); err != nil {
				t.Errorf("Unmount() = %v", err)
			}
		}
		if n := mounted(t, root); n != 0 {
			t.Errorf("mounts left = %d; want 0", n)
		}
	})
}

func TestMountUndoesOnError(t *testing.T) {
	inNamespace(t, func(t *testing.T, root string) {
		err := Mount(root, []*api.MountSpec{
			{Type: "tmpfs", Source: "tmpfs", Target: root + "/a"},
			{Type: "tmpfs", Source: "tmpfs", Target: root + "/a/b"},
			{Type: "bind", Source: "/no/such/source", Target: root + "/c", Options: []string{"bind"}},
		})
		if !errors.Is(err, os.ErrNotExist) {
			t.Errorf("Mount() = %v; want %v", err, os.ErrNotExist)
		}
		if want := "mount bind /no/such/source on " + root + "/c"; err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("Mount() = %v; want %q in it", err, want)
		}
		if n := mounted(t, root); n != 0 {
			t.Errorf("mounts left = %d; want 0", n)
		}
	})
}

// What a container has written must not lead a mount elsewhere.
func TestTargetsAreConfined(t *testing.T) {
	inNamespace(t, func(t *testing.T, root string) {
		outside := root + "-outside"
		if err := os.Mkdir(outside, 0o755); err != nil {
			t.Error(err)
		}
		defer os.Remove(outside)
		if err := os.Symlink(outside, root+"/link"); err != nil {
			t.Error(err)
		}
		for _, tt := range []struct {
			target string
			want   error
		}{
			{root, errdefs.ErrInvalidArgument},
			{root + "/", errdefs.ErrInvalidArgument},
			{root + "/../x", errdefs.ErrInvalidArgument},
			{root + "/a/../../x", errdefs.ErrInvalidArgument},
			{root + "//a", errdefs.ErrInvalidArgument},
			{outside, errdefs.ErrInvalidArgument},
			{"a", errdefs.ErrInvalidArgument},
			{"", errdefs.ErrInvalidArgument},
			{root + "/link", unix.ELOOP},
			{root + "/link/x", unix.ELOOP},
		} {
			err := Mount(root, []*api.MountSpec{{Type: "tmpfs", Source: "tmpfs", Target: tt.target}})
			if !errors.Is(err, tt.want) {
				t.Errorf("Mount(%s) = %v; want %v", tt.target, err, tt.want)
			}
			if err := Unmount(root, []string{tt.target}); !errors.Is(err, tt.want) {
				t.Errorf("Unmount(%s) = %v; want %v", tt.target, err, tt.want)
			}
		}
		if entries, err := os.ReadDir(outside); len(entries) > 0 || err != nil {
			t.Errorf("outside = %v, %v; want it untouched", entries, err)
		}
	})
}

func TestMountRefusals(t *testing.T) {
	root := t.TempDir()
	if err := Mount(root, make([]*api.MountSpec, Max+1)); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("Mount() of %d = %v; want %v", Max+1, err, errdefs.ErrInvalidArgument)
	}
	if err := Mount(root, []*api.MountSpec{{Type: "fuse3.sshfs", Target: root + "/a"}}); !errors.Is(err, errdefs.ErrNotImplemented) {
		t.Errorf("Mount() of fuse3.sshfs = %v; want %v", err, errdefs.ErrNotImplemented)
	}
	if err := Mount(root, []*api.MountSpec{{Type: "tmpfs", Target: root + "/a", Options: []string{"a\x00b"}}}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("Mount() with a NUL = %v; want %v", err, errdefs.ErrInvalidArgument)
	}
}

// RemoveAll must never reach into what is mounted.
func TestRemoveAll(t *testing.T) {
	inNamespace(t, func(t *testing.T, root string) {
		write(t, root+"/volume/precious", "data")
		err := Mount(root, []*api.MountSpec{
			{Type: "tmpfs", Source: "tmpfs", Target: root + "/bundle/rootfs"},
			{Source: root + "/volume", Target: root + "/bundle/rootfs/v", Options: []string{"bind"}},
			{Source: root + "/volume", Target: root + "/bundle/v2", Options: []string{"bind"}},
		})
		if err != nil {
			t.Errorf("Mount() = %v", err)
			return
		}
		write(t, root+"/bundle/rootfs/file", "x")
		busy, err := os.Open(root + "/bundle/rootfs/file")
		if err != nil {
			t.Error(err)
		}
		defer busy.Close()
		for range 2 {
			if err := RemoveAll(root + "/bundle"); err != nil {
				t.Errorf("RemoveAll() = %v", err)
			}
		}
		if _, err := os.Stat(root + "/bundle"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("bundle after RemoveAll: %v; want it gone", err)
		}
		if got := content(root + "/volume/precious"); got != "data" {
			t.Errorf("volume's file = %q; want data", got)
		}
		if n := mounted(t, root); n != 0 {
			t.Errorf("mounts left = %d; want 0", n)
		}
	})
}
