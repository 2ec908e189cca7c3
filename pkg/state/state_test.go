package state

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func sample() *Sandbox {
	five := 5
	return &Sandbox{
		ID: "web", Namespace: "k8s.io", Created: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
		Shim: Process{Pid: 10, StartTime: 11}, VM: Process{Pid: 12, StartTime: 13}, Helpers: []Process{{Pid: 14, StartTime: 15}},
		Containers: map[string]Container{"c1": {
			Bundle: "/run/b/c1", OCIVersion: "1.3.0", Annotations: map[string]string{"a": "b"},
			Poststop: []specs.Hook{{Path: "/hook", Args: []string{"hook"}, Timeout: &five}},
			Pid:      16, ExitStatus: 137, ExitedAt: time.Date(2026, 1, 2, 3, 5, 0, 0, time.UTC),
		}},
		CgroupPath: "/kubepods/x", Kernel: "tuned", Accelerator: "tcg", Vsock: "vhost-user", CID: 42,
	}
}

// saved returns a store that holds the sample, and its folder.
func saved(t *testing.T) (Store, string) {
	t.Helper()
	s := Open(filepath.Join(t.TempDir(), "vmrt"))
	dir, err := s.Create("k8s.io", "web")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Save(sample()); err != nil {
		t.Fatal(err)
	}
	return s, dir
}

func TestSaveLoad(t *testing.T) {
	s, dir := saved(t)
	got, err := s.Load("k8s.io", "web")
	if diff := cmp.Diff(sample(), got); err != nil || diff != "" {
		t.Errorf("Load() error %v (-want +got):\n%s", err, diff)
	}
	for name, want := range map[string]os.FileMode{dir: 0o700 | os.ModeDir, filepath.Dir(dir): 0o700 | os.ModeDir, filepath.Join(dir, "state.json"): 0o600} {
		if st, err := os.Stat(name); err != nil || st.Mode() != want {
			t.Errorf("mode of %s = %v, error %v; want %v", name, st.Mode(), err, want)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("folder has %v, error %v; want state.json alone", entries, err)
	}
}

func TestCreateTwice(t *testing.T) {
	s, _ := saved(t)
	if _, err := s.Create("k8s.io", "web"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second Create() error = %v; want already exists", err)
	}
}

func TestNames(t *testing.T) {
	s := Open(t.TempDir())
	for _, name := range []string{"", "..", "a/b", "/", "a\x00", strings.Repeat("x", 77)} {
		if _, err := s.Dir("ns", name); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Dir(ns, %q) error = %v; want invalid argument", name, err)
		}
		if _, err := s.Create(name, "id"); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Create(%q, id) error = %v; want invalid argument", name, err)
		}
		if err := s.Remove("ns", name); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Remove(ns, %q) error = %v; want invalid argument", name, err)
		}
		if err := s.Save(&Sandbox{Namespace: "ns", ID: name}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Save(ns, %q) error = %v; want invalid argument", name, err)
		}
	}
}

func TestLoadErrors(t *testing.T) {
	good, err := json.Marshal(document{Version: version, Sandbox: sample()})
	if err != nil {
		t.Fatal(err)
	}
	change := func(old, new string) string {
		t.Helper()
		if !strings.Contains(string(good), old) {
			t.Fatalf("%s is not in %s", old, good)
		}
		return strings.Replace(string(good), old, new, 1)
	}
	tests := []struct{ name, content, want string }{
		{"empty", "", "unexpected end of JSON input"},
		{"partial", string(good[:len(good)/2]), "unexpected end of JSON input"},
		{"zeros", strings.Repeat("\x00", 100), "invalid character"},
		{"not an object", `[]`, "cannot unmarshal array"},
		{"null", `null`, "version 0: want 1"},
		{"newer", change(`"version":1`, `"version":2`), "version 2: want 1"},
		{"of another sandbox", change(`"id":"web"`, `"id":"db"`), "it is of sandbox k8s.io/db"},
		{"negative pid", change(`"pid":10`, `"pid":-1`), "pid -1"},
		{"container's id", change(`"c1"`, `"../c1"`), `container id "../c1"`},
		{"container's bundle", change(`"/run/b/c1"`, `""`), `container c1: bundle ""`},
		{"wrong type", change(`"cid":42`, `"cid":-42`), "cannot unmarshal number -42"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, dir := saved(t)
			if err := os.WriteFile(filepath.Join(dir, "state.json"), []byte(tt.content), 0o600); err != nil {
				t.Fatal(err)
			}
			sb, err := s.Load("k8s.io", "web")
			if sb != nil || !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), tt.want) ||
				!strings.HasPrefix(err.Error(), "load state of sandbox k8s.io/web: ") {
				t.Errorf("Load() = %v, %v; want an error with %q of kind data loss", sb, err, tt.want)
			}
			if err := s.Remove("k8s.io", "web"); err != nil {
				t.Errorf("Remove() = %v; want nil", err)
			}
		})
	}
}

func TestLoadOddFiles(t *testing.T) {
	s, dir := saved(t)
	name := filepath.Join(dir, "state.json")
	if err := os.Truncate(name, maxFile+1); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Load("k8s.io", "web"); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "more than 16 MiB") {
		t.Errorf("Load() of a huge file: error = %v; want it to name the limit", err)
	}
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Load("k8s.io", "web"); !errdefs.IsNotFound(err) {
		t.Errorf("Load() without a file: error = %v; want not found", err)
	}
	if err := unix.Mkfifo(name, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Load("k8s.io", "web"); err == nil {
		t.Error("Load() of a FIFO: no error")
	}
}

func TestSaveIntoRemovedFolder(t *testing.T) {
	s, dir := saved(t)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := s.Save(sample()); err == nil || !strings.HasPrefix(err.Error(), "save state of sandbox k8s.io/web: ") {
		t.Errorf("Save() = %v; want an error that names the sandbox", err)
	}
}

// TestReadersSeeWholeFiles loads while another goroutine saves.
func TestReadersSeeWholeFiles(t *testing.T) {
	s, _ := saved(t)
	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Add(1)
	go func() {
		defer wg.Done()
		defer close(done)
		sb := sample()
		for i := range 50 {
			sb.Kernel = strings.Repeat("k", 100*i)
			if err := s.Save(sb); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	for {
		if _, err := s.Load("k8s.io", "web"); err != nil {
			t.Error(err)
			break
		}
		select {
		case <-done:
			wg.Wait()
			return
		default:
		}
	}
	wg.Wait()
}

func TestRemove(t *testing.T) {
	s, dir := saved(t)
	if _, err := s.Create("k8s.io", "other"); err != nil {
		t.Fatal(err)
	}
	outside := filepath.Join(t.TempDir(), "kept")
	if err := os.WriteFile(outside, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	mode := os.FileMode(0o700)
	if os.Getuid() == 0 {
		mode = 0o500 // Only root can empty such a folder.
	}
	for _, err := range []error{
		os.MkdirAll(filepath.Join(dir, "share/a/b"), mode),
		os.Symlink(filepath.Dir(outside), filepath.Join(dir, "link")),
		unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := s.Remove("k8s.io", "web"); err != nil {
			t.Errorf("Remove() = %v; want nil", err)
		}
	}
	if _, err := os.Lstat(dir); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", dir, err)
	}
	if _, err := os.Stat(outside); err != nil {
		t.Errorf("Remove followed a symbolic link: %v", err)
	}
	if err := s.Remove("k8s.io", "other"); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(filepath.Dir(dir)); !os.IsNotExist(err) {
		t.Errorf("the empty namespace's folder is still there: %v", err)
	}
}

// TestCreateWhileRemoving makes and removes sandboxes of one namespace from
// several goroutines: its folder comes and goes under them.
func TestCreateWhileRemoving(t *testing.T) {
	s := Open(t.TempDir())
	var wg sync.WaitGroup
	for _, id := range []string{"a", "b", "c"} {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for range 200 {
				if _, err := s.Create("ns", id); err != nil {
					t.Error(err)
				}
				if err := s.Remove("ns", id); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	wg.Wait()
}

func TestRemoveRefusesMounts(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("not root")
	}
	s, dir := saved(t)
	// A blank is escaped in the kernel's list.
	at := filepath.Join(dir, "share point")
	data := t.TempDir()
	if err := os.WriteFile(filepath.Join(data, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(data, at, "", unix.MS_BIND, ""); err != nil {
		t.Skipf("mount: %v", err)
	}
	err := s.Remove("k8s.io", "web")
	if want := at + " is still mounted"; !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), want) {
		t.Errorf("Remove() = %v; want %q", err, want)
	}
	if _, err := s.Load("k8s.io", "web"); err != nil {
		t.Errorf("a refused Remove took the state: %v", err)
	}
	if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove("k8s.io", "web"); err != nil {
		t.Errorf("Remove() = %v; want nil", err)
	}
	if _, err := os.Stat(filepath.Join(data, "file")); err != nil {
		t.Errorf("Remove took mounted data: %v", err)
	}
}

func TestList(t *testing.T) {
	if all, err := Open(filepath.Join(t.TempDir(), "absent")).List(); len(all) != 0 || err != nil {
		t.Errorf("List() of an absent store = %v, %v; want none", all, err)
	}
	s, dir := saved(t)
	if _, err := s.Create("default", "starting"); err != nil {
		t.Fatal(err)
	}
	broken, err := s.Create("default", "broken")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(broken, stateFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(filepath.Dir(dir)), "stray"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	all, err := s.List()
	if diff := cmp.Diff([]*Sandbox{sample()}, all); diff != "" {
		t.Errorf("List() (-want +got):\n%s", diff)
	}
	if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "default/broken") || strings.Contains(err.Error(), "starting") {
		t.Errorf("List() error = %v; want it to name default/broken and nothing else", err)
	}
}

func TestPointer(t *testing.T) {
	s, dir := saved(t)
	bundle := t.TempDir()
	if _, _, err := FromBundle(bundle); !errdefs.IsNotFound(err) {
		t.Errorf("FromBundle() without a pointer: error = %v; want not found", err)
	}
	if err := s.Link(bundle, "k8s.io", "web"); err != nil {
		t.Fatal(err)
	}
	store, sb, err := FromBundle(bundle)
	if diff := cmp.Diff(sample(), sb); err != nil || diff != "" || store != s {
		t.Errorf("FromBundle() = %v, error %v (-want +got):\n%s", store, err, diff)
	}

	if err := os.WriteFile(filepath.Join(dir, "state.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, sb, err = FromBundle(bundle)
	if diff := cmp.Diff(&Sandbox{ID: "web", Namespace: "k8s.io"}, sb); !errdefs.IsDataLoss(err) || diff != "" {
		t.Errorf("FromBundle() of a broken state: error %v (-want +got):\n%s", err, diff)
	}
	if err := s.Remove("k8s.io", "web"); err != nil {
		t.Fatal(err)
	}
	if _, sb, err := FromBundle(bundle); !errdefs.IsNotFound(err) || sb == nil || sb.ID != "web" {
		t.Errorf("FromBundle() without a state = %v, %v; want the sandbox's id and not found", sb, err)
	}

	for _, content := range []string{"", "{}", `{"version":1,"stateDir":"vmrt","namespace":"a","id":"b"}`, `{"version":1,"stateDir":"/run","namespace":"..","id":"b"}`} {
		if err := os.WriteFile(filepath.Join(bundle, pointerFile), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, sb, err := FromBundle(bundle); sb != nil || !errdefs.IsDataLoss(err) {
			t.Errorf("FromBundle() of pointer %q = %v, %v; want data loss", content, sb, err)
		}
	}
	if err := s.Link(bundle, "k8s.io", "../web"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("Link() to a bad id: error = %v; want invalid argument", err)
	}
}

// FuzzDecode holds the decoder to an error or a sandbox that can be saved.
func FuzzDecode(f *testing.F) {
	good, err := json.Marshal(document{Version: version, Sandbox: sample()})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"version":1,"Sandbox":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		sb := new(Sandbox)
		if decode(b, &document{Sandbox: sb}, sb.check) != nil {
			return
		}
		sb.Shim.Alive()
		again, err := json.Marshal(document{Version: version, Sandbox: sb})
		if err != nil {
			t.Fatalf("Marshal(%+v) error = %v", sb, err)
		}
		twice := new(Sandbox)
		if err := decode(again, &document{Sandbox: twice}, twice.check); err != nil {
			t.Fatalf("decode(%s) error = %v", again, err)
		}
	})
}
