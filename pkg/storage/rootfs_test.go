//go:build linux

package storage

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/podns/podnstest"
)

func (p *pod) rootfs(container string, mounts ...mount.Mount) Entry {
	p.t.Helper()
	e, err := p.AddRootfs(container, mounts)
	if err != nil {
		p.t.Fatal(err)
	}
	if want := filepath.Join(p.Root(), filepath.FromSlash(e.Share)); e.Host != want || !e.Dir {
		p.t.Errorf("AddRootfs = %+v; want a folder at %s", e, want)
	}
	p.checkFlags(e.Host, unix.ST_NODEV|unix.ST_NOSUID)
	p.checkStage()
	return e
}

// checkStage looks for mounts that were left in the stage.
func (p *pod) checkStage() {
	p.t.Helper()
	p.inside(func() error {
		for _, m := range podnstest.Mounts(p.t, "/proc/thread-self") {
			if strings.Contains(m, p.stage()) {
				p.t.Errorf("left in the stage: %s", m)
			}
		}
		return nil
	})
}

// snapshot makes what the overlayfs snapshotter has for a container on n
// layers, the last of which is the lowest. File fN is in layer N, file all in
// each.
func snapshot(t *testing.T, dir string, n int) mount.Mount {
	t.Helper()
	var lower []string
	for i := range n {
		layer := filepath.Join(dir, fmt.Sprint(i), "fs")
		write(t, filepath.Join(layer, fmt.Sprint("f", i)), "")
		write(t, filepath.Join(layer, "all"), fmt.Sprint("layer ", i))
		lower = append(lower, overlayQuote(layer))
	}
	upper, work := filepath.Join(dir, "own", "fs"), filepath.Join(dir, "own", "work")
	for _, d := range []string{upper, work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return mount.Mount{Type: "overlay", Source: "overlay", Options: []string{
		"index=off", "workdir=" + overlayQuote(work), "upperdir=" + overlayQuote(upper), "lowerdir=" + strings.Join(lower, ":"),
	}}
}

func overlayQuote(path string) string {
	return strings.NewReplacer(`\`, `\\`, `:`, `\:`, `,`, `\,`).Replace(path)
}

func TestOverlay(t *testing.T) {
	for _, tt := range []struct {
		name   string
		layers int
		folder string
		legacy bool
	}{
		{name: "one layer", layers: 1},
		{name: "three layers", layers: 3},
		{name: "legacy", layers: 3, legacy: true},
		{name: "as many as images have", layers: 127},
		{name: "long names", layers: 100, folder: strings.Repeat("long/", 30)},
		{name: "quoted names", layers: 3, folder: `a:b,c\d e/own\,`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPod(t)
			p.legacy = tt.legacy
			dir := filepath.Join(t.TempDir(), tt.folder)
			e := p.rootfsOf(snapshot(t, dir, tt.layers), tt.legacy)
			if got := p.read(e.Host + "/all"); got != "layer 0" {
				t.Errorf("file of all layers = %q; want that of the highest", got)
			}
			for i := range tt.layers {
				p.read(e.Host + fmt.Sprint("/f", i))
			}
			if err := p.write(e.Host+"/new", "written"); err != nil {
				t.Fatal(err)
			}
			if b, err := os.ReadFile(filepath.Join(dir, "own/fs/new")); string(b) != "written" {
				t.Errorf("new file in the upper folder = %q, %v", b, err)
			}
			if err := p.RemoveContainer("web"); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]string{""}, p.list()); diff != "" {
				t.Errorf("the share (-want +got):\n%s", diff)
			}
		})
	}
}

func (p *pod) rootfsOf(m mount.Mount, legacy bool) Entry {
	p.t.Helper()
	if !legacy {
		return p.rootfs("web", m)
	}
	e, err := p.AddRootfs("web", []mount.Mount{m})
	if err != nil {
		p.t.Fatal(err)
	}
	return e
}

// A view has no upper folder, and is read-only.
func TestOverlayView(t *testing.T) {
	p := newPod(t)
	m := snapshot(t, t.TempDir(), 2)
	m.Options = m.Options[3:]
	e := p.rootfs("web", m)
	if err := p.write(e.Host+"/new", ""); !errors.Is(err, unix.EROFS) {
		t.Errorf("write to a view = %v; want %v", err, unix.EROFS)
	}
}

// The snapshotter's folder, and layers, may be on mounts that the host made
// after the pod was made.
func TestOverlayOfLaterMounts(t *testing.T) {
	p := newPod(t)
	dir := t.TempDir()
	hostMount(t, dir)
	m := snapshot(t, dir, 2)
	layer := filepath.Join(dir, "mounted")
	if err := os.Mkdir(layer, 0o755); err != nil {
		t.Fatal(err)
	}
	hostMount(t, layer)
	write(t, filepath.Join(layer, "fmounted"), "")
	m.Options[3] += ":" + layer
	e := p.rootfs("web", m)
	for _, f := range []string{"f0", "f1", "fmounted"} {
		p.read(e.Host + "/" + f)
	}
}

func TestRootfsBind(t *testing.T) {
	for _, ro := range []bool{false, true} {
		t.Run(fmt.Sprintf("ro=%v", ro), func(t *testing.T) {
			p := newPod(t)
			dir := t.TempDir()
			write(t, filepath.Join(dir, "f"), "native")
			m := mount.Mount{Type: "bind", Source: dir, Options: []string{"rbind", "rw"}}
			if ro {
				m.Options[1] = "ro"
			}
			e := p.rootfs("web", m)
			if got := p.read(e.Host + "/f"); got != "native" {
				t.Errorf("file in the root file system = %q; want native", got)
			}
			if err := p.write(e.Host+"/g", ""); errors.Is(err, unix.EROFS) != ro {
				t.Errorf("write = %v; want read-only: %v", err, ro)
			}
		})
	}
}

// image makes a file system image with the file "hello" in it.
func image(t *testing.T, mkfs string, args func(dir, img string) []string) string {
	t.Helper()
	tool, err := exec.LookPath(mkfs)
	if err != nil {
		tool = filepath.Join("/usr/sbin", mkfs)
		if _, err := os.Stat(tool); err != nil {
			t.Skipf("needs %s", mkfs)
		}
	}
	dir, img := t.TempDir(), filepath.Join(t.TempDir(), "image")
	write(t, filepath.Join(dir, "hello"), "from the image")
	out, err := exec.Command(tool, args(dir, img)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", mkfs, err, out)
	}
	return img
}

func TestRootfsExt4Loop(t *testing.T) {
	img := image(t, "mkfs.ext4", func(dir, img string) []string { return []string{"-q", "-d", dir, img, "4m"} })
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("needs the loop driver: ", err)
	}
	p := newPod(t)
	e := p.rootfs("web", mount.Mount{Type: "ext4", Source: img, Options: []string{"loop", "rw"}})
	if got := p.read(e.Host + "/hello"); got != "from the image" {
		t.Errorf("file in the image = %q", got)
	}
	if err := p.write(e.Host+"/new", "x"); err != nil {
		t.Error(err)
	}
	if got := loops(t, img); got != 1 {
		t.Errorf("%d loop devices have the image; want 1", got)
	}
	if err := p.RemoveContainer("web"); err != nil {
		t.Error(err)
	}
	podnstest.Wait(t, "the loop device to let go of the image", func() bool { return loops(t, img) == 0 })
}

func loops(t *testing.T, img string) (n int) {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) == img {
			n++
		}
	}
	return n
}

func TestRootfsErofs(t *testing.T) {
	img := image(t, "mkfs.erofs", func(dir, img string) []string { return []string{"--quiet", img, dir} })
	p := newPod(t)
	e, err := p.AddRootfs("web", []mount.Mount{{Type: "erofs", Source: img, Options: []string{"ro"}}})
	if errors.Is(err, unix.ENOTBLK) || errors.Is(err, unix.ENODEV) {
		t.Skip("needs a kernel that mounts erofs from files: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if got := p.read(e.Host + "/hello"); got != "from the image" {
		t.Errorf("file in the image = %q", got)
	}
}

// Several mounts make one root file system, the later ones below the first.
func TestRootfsOfSeveralMounts(t *testing.T) {
	p := newPod(t)
	m := snapshot(t, t.TempDir(), 1)
	write(t, strings.TrimPrefix(m.Options[3], "lowerdir=")+"/below/x", "")
	e := p.rootfs("web", m, mount.Mount{Type: "tmpfs", Source: "tmpfs", Target: "below", Options: []string{"size=64k"}})
	if err := p.write(e.Host+"/below/y", "in the tmpfs"); err != nil {
		t.Fatal(err)
	}
	if got := p.read(e.Host + "/below/y"); got != "in the tmpfs" {
		t.Errorf("file in the second mount = %q", got)
	}
}

func TestRootfsErrors(t *testing.T) {
	dir := t.TempDir()
	lower := filepath.Join(dir, "lower")
	write(t, lower+"/f", "")
	for _, tt := range []struct {
		name   string
		mounts []mount.Mount
		want   error
		text   string
	}{
		{name: "none", text: "no mounts"},
		{name: "missing layer", want: os.ErrNotExist, text: "/nonexistent",
			mounts: []mount.Mount{{Type: "overlay", Options: []string{"lowerdir=/nonexistent:" + lower}}}},
		{name: "missing bind source", want: os.ErrNotExist, text: "/nonexistent",
			mounts: []mount.Mount{{Type: "bind", Source: "/nonexistent", Options: []string{"rbind"}}}},
		{name: "missing image", want: os.ErrNotExist, text: "/nonexistent",
			mounts: []mount.Mount{{Type: "ext4", Source: "/nonexistent", Options: []string{"loop"}}}},
		{name: "no work folder", text: "workdir",
			mounts: []mount.Mount{{Type: "overlay", Options: []string{"lowerdir=" + lower, "upperdir=" + dir}}}},
		{name: "missing work folder", want: os.ErrNotExist, text: "/nonexistent",
			mounts: []mount.Mount{{Type: "overlay", Options: []string{"lowerdir=" + lower, "upperdir=" + dir, "workdir=/nonexistent"}}}},
		{name: "unknown type", want: unix.ENODEV,
			mounts: []mount.Mount{{Type: "nosuchfs", Source: "x"}}},
		{name: "fuse", want: errors.ErrUnsupported,
			mounts: []mount.Mount{{Type: "fuse3.fuse-overlayfs", Options: []string{"lowerdir=" + lower}}}},
		{name: "mount manager", want: errors.ErrUnsupported,
			mounts: []mount.Mount{{Type: "format/mkdir/overlay"}}},
		{name: "users mapped, groups not", text: "no gid mappings found",
			mounts: []mount.Mount{{Type: "overlay", Options: []string{"uidmap=0:1000:1", "lowerdir=" + lower}}}},
		{name: "malformed ids", text: `id mapping "0:1000"`,
			mounts: []mount.Mount{{Type: "overlay", Options: []string{"uidmap=0:1000", "gidmap=0:1000:1", "lowerdir=" + lower}}}},
		{name: "ids of a tmpfs", want: errors.ErrUnsupported,
			mounts: []mount.Mount{{Type: "tmpfs", Source: "tmpfs", Options: []string{"uidmap=0:1000:1", "gidmap=0:1000:1"}}}},
		{name: "bind option", want: errors.ErrUnsupported,
			mounts: []mount.Mount{{Type: "bind", Source: dir, Options: []string{"bind", "noexec"}}}},
		{name: "second mount fails", want: unix.ENODEV,
			mounts: []mount.Mount{{Type: "tmpfs", Source: "tmpfs"}, {Type: "nosuchfs", Source: "x"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPod(t)
			_, err := p.AddRootfs("web", tt.mounts)
			if err == nil || !strings.Contains(err.Error(), "container web") || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("AddRootfs = %v; want an error with the container and %q in it", err, tt.text)
			}
			if tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("AddRootfs = %v; want %v", err, tt.want)
			}
			p.checkStage()
			// The container is usable all the same.
			p.rootfs("web", mount.Mount{Type: "bind", Source: dir, Options: []string{"rbind"}})
		})
	}
}

func TestRootfsTwice(t *testing.T) {
	p := newPod(t)
	m := mount.Mount{Type: "bind", Source: t.TempDir(), Options: []string{"rbind"}}
	p.rootfs("web", m)
	if e, err := p.AddRootfs("web", []mount.Mount{m}); !errors.Is(err, os.ErrExist) {
		t.Errorf("second AddRootfs = %+v, %v; want %v", e, err, os.ErrExist)
	}
	p.checkStage()
}

func TestSplitUnescaped(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want []string
	}{
		{"", []string{""}},
		{"a", []string{"a"}},
		{"a:b:c", []string{"a", "b", "c"}},
		{`a\:b:c`, []string{`a\:b`, "c"}},
		{`a\\:b`, []string{`a\\`, "b"}},
		{"a::b", []string{"a", "", "b"}},
		{`a\`, []string{`a\`}},
	} {
		if diff := cmp.Diff(tt.want, splitUnescaped(tt.in, ':')); diff != "" {
			t.Errorf("splitUnescaped(%q, ':') (-want +got):\n%s", tt.in, diff)
		}
	}
}

func TestEscape(t *testing.T) {
	for _, s := range []string{"", "a", `a:b,c\d`, `\`, `\\`} {
		if got := unescape(escape(s)); got != s {
			t.Errorf("unescape(escape(%q)) = %q", s, got)
		}
	}
	if got := unescape(`a\`); got != `a\` {
		t.Errorf(`unescape("a\") = %q; want it unchanged`, got)
	}
}
