//go:build linux

package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/podns/podnstest"
)

func TestMain(m *testing.M) {
	podnstest.Main(m, map[string]func(){"pod": helperPod})
}

func TestAgainShared(t *testing.T) { podnstest.AgainShared(t) }

// pod is a share in namespaces of its own.
type pod struct {
	*Share
	t  *testing.T
	ns *podns.Namespaces
}

func newPod(t *testing.T) *pod {
	t.Helper()
	ns := podnstest.Open(t, podns.Config{})
	dir := t.TempDir()
	s, err := NewShare(ns, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close() = %v; want nil", err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("the share left %v on the host (%v)", left, err)
		}
	})
	return &pod{Share: s, t: t, ns: ns}
}

// inside runs f in the pod's mount namespace.
func (p *pod) inside(f func() error) error {
	p.t.Helper()
	return p.ns.Do(p.t.Context(), f)
}

func (p *pod) read(path string) string {
	p.t.Helper()
	var b []byte
	err := p.inside(func() (err error) {
		b, err = os.ReadFile(path)
		return err
	})
	if err != nil {
		p.t.Error(err)
	}
	return string(b)
}

func (p *pod) write(path, content string) error {
	p.t.Helper()
	return p.inside(func() error { return os.WriteFile(path, []byte(content), 0o600) })
}

func (p *pod) bind(container, source string, o BindOptions) Entry {
	p.t.Helper()
	e, err := p.AddBind(container, source, o)
	if err != nil {
		p.t.Fatal(err)
	}
	if want := filepath.Join(p.Root(), filepath.FromSlash(e.Share)); e.Host != want {
		p.t.Errorf("AddBind(%q).Host = %q; want %q", source, e.Host, want)
	}
	return e
}

// list returns everything below the root that the guest gets.
func (p *pod) list() []string {
	p.t.Helper()
	var names []string
	err := p.inside(func() error {
		return filepath.WalkDir(p.Root(), func(path string, _ fs.DirEntry, err error) error {
			names = append(names, strings.TrimPrefix(path, p.Root()))
			return err
		})
	})
	if err != nil {
		p.t.Error(err)
	}
	return names
}

func write(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestBindFolder(t *testing.T) {
	p := newPod(t)
	dir := t.TempDir()
	write(t, filepath.Join(dir, "a"), "from the host")
	e := p.bind("web", dir, BindOptions{})
	if !e.Dir {
		t.Errorf("AddBind(folder) = %+v; want Dir", e)
	}
	if got := p.read(e.Host + "/a"); got != "from the host" {
		t.Errorf("file in the share = %q", got)
	}
	write(t, filepath.Join(dir, "a"), "later")
	if got := p.read(e.Host + "/a"); got != "later" {
		t.Errorf("file in the share after a change = %q", got)
	}
	if err := p.write(e.Host+"/b", "from the guest"); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "b")); string(b) != "from the guest" {
		t.Errorf("file on the host = %q, %v", b, err)
	}
	// Neither a private nor a shared host sees the pod's mounts.
	if entries, err := os.ReadDir(p.dir); err != nil || len(entries) != 0 {
		t.Errorf("the share's folder on the host has %v, %v; want nothing", entries, err)
	}
}

func TestBindFileWithoutSiblings(t *testing.T) {
	p := newPod(t)
	dir := t.TempDir()
	file := write(t, filepath.Join(dir, "hosts"), "127.0.0.1 localhost")
	write(t, filepath.Join(dir, "secret"), "")
	e := p.bind("web", file, BindOptions{})
	if e.Dir {
		t.Errorf("AddBind(file) = %+v; want no Dir", e)
	}
	if got := p.read(e.Host); got != "127.0.0.1 localhost" {
		t.Errorf("file in the share = %q", got)
	}
	if err := p.write(e.Host, "changed"); err != nil {
		t.Error(err)
	}
	if b, _ := os.ReadFile(file); string(b) != "changed" {
		t.Errorf("file on the host = %q; want the guest's change", b)
	}
	want := []string{"", "/web.1", "/web.1/mounts", "/web.1/mounts/0"}
	if diff := cmp.Diff(want, p.list()); diff != "" {
		t.Errorf("the share (-want +got):\n%s", diff)
	}
}

func TestRootIsReadOnly(t *testing.T) {
	p := newPod(t)
	e := p.bind("web", t.TempDir(), BindOptions{})
	for _, path := range []string{p.Root() + "/x", filepath.Dir(e.Host) + "/x"} {
		if err := p.write(path, ""); !errors.Is(err, unix.EROFS) {
			t.Errorf("write %s = %v; want %v", path, err, unix.EROFS)
		}
	}
}

// layered returns a folder with a file system mounted in its folder "sub", and
// another in that one's folder "sub".
func layered(t *testing.T) (dir, sub string) {
	t.Helper()
	dir = t.TempDir()
	sub = filepath.Join(dir, "sub")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	hostMount(t, sub)
	write(t, filepath.Join(sub, "deep"), "deep")
	deeper := filepath.Join(sub, "sub")
	if err := os.Mkdir(deeper, 0o755); err != nil {
		t.Fatal(err)
	}
	hostMount(t, deeper)
	write(t, filepath.Join(deeper, "f"), "")
	return dir, sub
}

// hostMount mounts a tmpfs in the host's mount namespace until the test ends.
func hostMount(t *testing.T, dir string) {
	t.Helper()
	if err := unix.Mount("host", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

func TestBindOptions(t *testing.T) {
	for _, legacy := range []bool{false, true} {
		for _, tt := range []struct {
			name               string
			options            BindOptions
			deep, topRO, subRO bool
			slave, unsupported bool
		}{
			{name: "bind"},
			{name: "rbind", options: BindOptions{Recursive: true}, deep: true},
			{name: "bind,ro", options: BindOptions{ReadOnly: true}, topRO: true, subRO: true},
			{name: "rbind,ro", options: BindOptions{Recursive: true, ReadOnly: true}, deep: true, topRO: true},
			{name: "rbind,rro", options: BindOptions{Recursive: true, ReadOnlyRecursive: true}, deep: true, topRO: true, subRO: true, unsupported: legacy},
			{name: "rbind,rslave", options: BindOptions{Recursive: true, Slave: true}, deep: true, slave: true},
		} {
			t.Run(fmt.Sprintf("%s,legacy=%v", tt.name, legacy), func(t *testing.T) {
				p := newPod(t)
				p.legacy = legacy
				dir, sub := layered(t)
				e, err := p.AddBind("web", dir, tt.options)
				if tt.unsupported {
					if !errors.Is(err, errors.ErrUnsupported) {
						t.Fatalf("AddBind = %v; want unsupported", err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				var deep error
				p.inside(func() error {
					_, deep = os.Stat(e.Host + "/sub/deep")
					return nil
				})
				if got := deep == nil; got != tt.deep {
					t.Errorf("file of a mount below = %v; want it there: %v", deep, tt.deep)
				}
				if err := p.write(e.Host+"/x", ""); errors.Is(err, unix.EROFS) != tt.topRO {
					t.Errorf("write in the mount = %v; want read-only: %v", err, tt.topRO)
				}
				if err := p.write(e.Host+"/sub/x", ""); errors.Is(err, unix.EROFS) != tt.subRO {
					t.Errorf("write in the mount below = %v; want read-only: %v", err, tt.subRO)
				}
				p.checkFlags(e.Host, unix.ST_NODEV|unix.ST_NOSUID)
				p.checkLaterMount(dir, e, tt.slave)
				// The pod's unmounts are its own.
				if err := p.RemoveContainer("web"); err != nil {
					t.Error(err)
				}
				for _, f := range []string{"deep", "sub/f"} {
					if _, err := os.Stat(filepath.Join(sub, f)); err != nil {
						t.Errorf("a mount of the host, once the container was removed: %v", err)
					}
				}
			})
		}
	}
}

func (p *pod) checkFlags(path string, want int64) {
	p.t.Helper()
	var st unix.Statfs_t
	if err := p.inside(func() error { return unix.Statfs(path, &st) }); err != nil {
		p.t.Fatal(err)
	}
	if st.Flags&want != want {
		p.t.Errorf("statfs(%s).f_flags = %#x; want %#x in it", path, st.Flags, want)
	}
}

// checkLaterMount mounts something below dir on the host and says whether the
// guest sees it: only where the host's mounts are shared and the guest's is a
// slave.
func (p *pod) checkLaterMount(dir string, e Entry, slave bool) {
	p.t.Helper()
	later := filepath.Join(dir, "later")
	if err := os.Mkdir(later, 0o755); err != nil {
		p.t.Fatal(err)
	}
	hostMount(p.t, later)
	write(p.t, filepath.Join(later, "f"), "")
	var err error
	p.inside(func() error {
		_, err = os.Stat(e.Host + "/later/f")
		return nil
	})
	b, readErr := os.ReadFile("/proc/self/mountinfo")
	if readErr != nil {
		p.t.Fatal(readErr)
	}
	want := slave && strings.Contains(string(b), " shared:")
	if got := err == nil; got != want {
		p.t.Errorf("a later mount of the host in the share: %v; want it there: %v", err, want)
	}
}

// A mount that the host made after the pod was made is found, whatever the
// propagation.
func TestBindOfLaterMount(t *testing.T) {
	p := newPod(t)
	dir := t.TempDir()
	hostMount(t, dir)
	file := write(t, filepath.Join(dir, "f"), "late")
	if got := p.read(p.bind("web", file, BindOptions{}).Host); got != "late" {
		t.Errorf("file on a later mount = %q; want late", got)
	}
	e := p.bind("web", dir, BindOptions{})
	if got := p.read(e.Host + "/f"); got != "late" {
		t.Errorf("file below a later mount = %q; want late", got)
	}
}

func TestBindMissingSource(t *testing.T) {
	p := newPod(t)
	_, err := p.AddBind("web", "/nonexistent/source", BindOptions{})
	if want := "stat /nonexistent/source: no such file or directory"; err == nil || err.Error() != want {
		t.Errorf("AddBind(missing) = %v; want %s", err, want)
	}
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("AddBind(missing) = %v; want not exist", err)
	}
	if diff := cmp.Diff([]string{""}, p.list()); diff != "" {
		t.Errorf("the share (-want +got):\n%s", diff)
	}
}

func TestBindOtherKinds(t *testing.T) {
	p := newPod(t)
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	if e := p.bind("web", fifo, BindOptions{ReadOnly: true}); e.Dir || !e.Endpoint {
		t.Errorf("AddBind(FIFO) = %+v; want an Endpoint, no Dir", e)
	}
	if e := p.bind("web", link, BindOptions{}); !e.Dir {
		t.Errorf("AddBind(link to a folder) = %+v; want Dir", e)
	}
	if e := p.bind("web", "/dev/null", BindOptions{}); e.Dir || e.Endpoint {
		t.Errorf("AddBind(/dev/null) = %+v; want no Dir and no Endpoint", e)
	} else if err := p.inside(func() error { _, err := os.ReadFile(e.Host); return err }); !errors.Is(err, os.ErrPermission) {
		t.Errorf("open of a device in the share = %v; want it refused", err)
	}
}

func TestHundredBinds(t *testing.T) {
	p := newPod(t)
	dir := t.TempDir()
	var entries []Entry
	for i := range 100 {
		path := filepath.Join(dir, fmt.Sprint(i), "f")
		write(t, path, fmt.Sprint("content ", i))
		if i%2 == 0 {
			path = filepath.Dir(path)
		}
		entries = append(entries, p.bind("web", path, BindOptions{ReadOnly: i%3 == 0}))
	}
	for i, e := range entries {
		if e.Dir {
			e.Host += "/f"
		}
		if got, want := p.read(e.Host), fmt.Sprint("content ", i); got != want {
			t.Errorf("bind %d = %q; want %q", i, got, want)
		}
		if err := p.write(e.Host, fmt.Sprint("changed ", i)); errors.Is(err, unix.EROFS) != (i%3 == 0) {
			t.Errorf("write to bind %d = %v; want read-only: %v", i, err, i%3 == 0)
		}
	}
}

func TestRemoveContainer(t *testing.T) {
	p := newPod(t)
	dir, _ := layered(t)
	write(t, filepath.Join(dir, "precious"), "kept")
	e := p.bind("web", dir, BindOptions{Recursive: true})
	other := p.bind("db", write(t, filepath.Join(t.TempDir(), "f"), "other"), BindOptions{})
	// Something that is in use goes all the same.
	var inUse *os.File
	err := p.inside(func() (err error) {
		inUse, err = os.Open(e.Host + "/precious")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer inUse.Close()

	for range 2 {
		if err := p.RemoveContainer("web"); err != nil {
			t.Errorf("RemoveContainer(web) = %v; want nil", err)
		}
	}
	if err := p.RemoveContainer("unknown"); err != nil {
		t.Errorf("RemoveContainer(unknown) = %v; want nil", err)
	}
	want := []string{"", "/db.2", "/db.2/mounts", "/db.2/mounts/0"}
	if diff := cmp.Diff(want, p.list()); diff != "" {
		t.Errorf("the share (-want +got):\n%s", diff)
	}
	if got := p.read(other.Host); got != "other" {
		t.Errorf("another container's file = %q", got)
	}
	for _, f := range []string{"precious", "sub/deep"} {
		if _, err := os.Stat(filepath.Join(dir, f)); err != nil {
			t.Errorf("file of a removed container's volume: %v", err)
		}
	}
	if e := p.bind("web", dir, BindOptions{}); e.Share != "web.3/mounts/0" {
		t.Errorf("AddBind after RemoveContainer = %q; want a new name", e.Share)
	}
}

func TestBadIDs(t *testing.T) {
	p := newPod(t)
	for _, id := range []string{"", ".", "..", "a/b", "../x", strings.Repeat("x", 201)} {
		if e, err := p.AddBind(id, "/etc", BindOptions{}); err == nil {
			t.Errorf("AddBind(%q) = %+v; want an error", id, e)
		}
	}
}

func TestShareAfterClose(t *testing.T) {
	p := newPod(t)
	p.bind("web", "/etc", BindOptions{})
	for range 2 {
		if err := p.Close(); err != nil {
			t.Errorf("Close() = %v; want nil", err)
		}
	}
	if _, err := p.AddBind("web", "/etc", BindOptions{}); !errors.Is(err, ErrClosed) {
		t.Errorf("AddBind after Close = %v; want %v", err, ErrClosed)
	}
	if err := p.RemoveContainer("web"); err != nil {
		t.Errorf("RemoveContainer after Close = %v; want nil", err)
	}
	p.ns.Close()
	if err := p.Close(); err != nil {
		t.Errorf("Close() without a pod = %v; want nil", err)
	}
	if err := p.RemoveContainer("web"); err != nil {
		t.Errorf("RemoveContainer without a pod = %v; want nil", err)
	}
}

func TestNewShareErrors(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{})
	for _, dir := range []string{"relative", "/nonexistent", "/dev/null"} {
		if _, err := NewShare(ns, dir); err == nil || !strings.Contains(err.Error(), dir) {
			t.Errorf("NewShare(%q) = %v; want an error that names it", dir, err)
		}
	}
}

func BenchmarkAddBind(b *testing.B) {
	ns := podnstest.Open(b, podns.Config{})
	s, err := NewShare(ns, b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	for i := 0; b.Loop(); i++ {
		if _, err := s.AddBind(fmt.Sprint("c", i/100), "/etc", BindOptions{Recursive: true, ReadOnly: true}); err != nil {
			b.Fatal(err)
		}
	}
}
