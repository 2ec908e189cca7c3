//go:build linux

package anchor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/podns/podnstest"
	"github.com/vmrt/vmrt/pkg/tinyelf"
)

func TestMain(m *testing.M) { podnstest.Main(m, nil) }

func TestAgainShared(t *testing.T) { podnstest.AgainShared(t) }

// rootfs returns a root file system with some files in it.
func rootfs(tb testing.TB, files ...string) string {
	tb.Helper()
	root := tb.TempDir()
	for _, f := range files {
		path := filepath.Join(root, f)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			tb.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("of the image"), 0o644); err != nil {
			tb.Fatal(err)
		}
	}
	return root
}

func start(tb testing.TB, ns *podns.Namespaces, cfg Config) *Anchor {
	tb.Helper()
	a, err := Start(ns, cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := a.Close(); err != nil {
			tb.Errorf("Close() = %v; want nil", err)
		}
	})
	return a
}

func (a *Anchor) file(name string) string { return fmt.Sprintf("/proc/%d/%s", a.Pid(), name) }

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// status returns a field of /proc/<pid>/status.
func (a *Anchor) status(t *testing.T, field string) string {
	t.Helper()
	for line := range strings.Lines(read(t, a.file("status"))) {
		if name, value, _ := strings.Cut(line, ":"); name == field {
			return strings.Join(strings.Fields(value), " ")
		}
	}
	t.Fatalf("no field %s in %s", field, a.file("status"))
	return ""
}

func TestIdentity(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{})
	groups, err := syscall.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setgroups([]int{0, 4, 65533}); err != nil {
		t.Fatal(err)
	}
	defer syscall.Setgroups(groups)
	a := start(t, ns, Config{Args: []string{"sleep", "1000"}, Root: rootfs(t)})
	for field, want := range map[string]string{
		"Name":       comm,
		"PPid":       fmt.Sprint(os.Getpid()),
		"Uid":        "65534 65534 65534 65534",
		"Gid":        "65534 65534 65534 65534",
		"Groups":     "",
		"NSpid":      fmt.Sprint(a.Pid(), " 1"),
		"NSsid":      fmt.Sprint(a.Pid(), " 1"),
		"CapInh":     "0000000000000000",
		"CapPrm":     "0000000000000000",
		"CapEff":     "0000000000000000",
		"CapBnd":     "0000000000000000",
		"CapAmb":     "0000000000000000",
		"NoNewPrivs": "1",
		"Threads":    "1",
	} {
		if got := a.status(t, field); got != want {
			t.Errorf("%s = %q; want %q", field, got, want)
		}
	}
	if got, want := read(t, a.file("cmdline")), "vmrt:\x00sleep\x001000\x00"; got != want {
		t.Errorf("command line = %q; want %q", got, want)
	}
	if got := read(t, a.file("environ")); got != "" {
		t.Errorf("environment = %q; want nothing", got)
	}
	fds, err := os.ReadDir(a.file("fd"))
	if err != nil || len(fds) != 0 {
		t.Errorf("open files = %v, %v; want none", fds, err)
	}
}

func TestNamespaces(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{})
	a := start(t, ns, Config{Root: rootfs(t)})
	b := start(t, ns, Config{Root: rootfs(t)})
	link := func(path string) string {
		t.Helper()
		s, err := os.Readlink(path)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for _, kind := range []string{"pid", "ipc", "uts", "cgroup", "mnt"} {
		host, one, other := link("/proc/self/ns/"+kind), link(a.file("ns/"+kind)), link(b.file("ns/"+kind))
		if one == host || one == other {
			t.Errorf("%s namespaces: host %s, one anchor %s, another %s; want three different", kind, host, one, other)
		}
	}
	if got, pod := link(a.file("ns/mnt")), link(ns.MountPath()); got == pod {
		t.Errorf("the anchor is in the pod's mount namespace")
	}
	if got, want := link(a.file("ns/net")), link(ns.NetPath()); got != want {
		t.Errorf("network namespace = %s; want the pod's, %s", got, want)
	}
}

func TestSignals(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{})
	a := start(t, ns, Config{Root: rootfs(t)})
	// All but SIGKILL and SIGSTOP are ignored, as container inits do.
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGSEGV, syscall.SIGUSR1} {
		if err := syscall.Kill(a.Pid(), sig); err != nil {
			t.Fatal(err)
		}
	}
	for _, sig := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGCONT} {
		if err := syscall.Kill(a.Pid(), sig); err != nil {
			t.Fatal(err)
		}
	}
	podnstest.Wait(t, "the anchor to sleep again", func() bool { return strings.HasPrefix(a.status(t, "State"), "S") })
	if got := a.Signal(); got != 0 {
		t.Errorf("Signal() of a live anchor = %v; want 0", got)
	}
	if err := syscall.Kill(a.Pid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	podnstest.Receive(t, "the end of the anchor", a.Done())
	if got := a.Signal(); got != syscall.SIGKILL {
		t.Errorf("Signal() = %v; want %v", got, syscall.SIGKILL)
	}
	for range 2 {
		if err := a.Close(); err != nil {
			t.Errorf("Close() after the end = %v; want nil", err)
		}
	}
}

func TestEndsWithThePod(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{})
	a := start(t, ns, Config{Root: rootfs(t)})
	ns.Close()
	podnstest.Receive(t, "the end of the anchor", a.Done())
	if _, err := Start(ns, Config{Root: "/"}); !errors.Is(err, podns.ErrClosed) {
		t.Errorf("Start in a closed pod = %v; want %v", err, podns.ErrClosed)
	}
}

func TestStartErrors(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{})
	for _, cfg := range []Config{
		{Root: "/nonexistent"},
		{Root: ""},
		{Root: rootfs(t, "x"), Binds: []Bind{{Source: "/nonexistent", Target: "/x"}}},
	} {
		if a, err := Start(ns, cfg); err == nil {
			a.Close()
			t.Errorf("Start(%+v) = nil; want an error", cfg)
		}
	}
}

func TestTitle(t *testing.T) {
	long := strings.Repeat("x", 3000)
	for _, tt := range []struct {
		args, want []string
	}{
		{nil, []string{"vmrt:"}},
		{[]string{"sh", "-c", "a b"}, []string{"vmrt:", "sh", "-c", "a b"}},
		{[]string{"a\x00b"}, []string{"vmrt:", "ab"}},
		{[]string{long, long, "never seen"}, []string{"vmrt:", long, long[:maxArgs-3001]}},
	} {
		if diff := cmp.Diff(tt.want, title(tt.args)); diff != "" {
			t.Errorf("title(%d strings) (-want +got):\n%s", len(tt.args), diff)
		}
	}
}

// maxPrivate bounds an anchor's private memory, in KiB: a page of program and
// two or three of stack.
const maxPrivate = 32

func TestMemory(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{})
	a := start(t, ns, Config{Args: []string{"sleep", "1000"}, Root: rootfs(t)})
	total := 0
	for line := range strings.Lines(read(t, a.file("smaps_rollup"))) {
		var kib int
		if n, _ := fmt.Sscanf(line, "Private_Dirty: %d kB", &kib); n == 1 {
			total += kib
		}
		if n, _ := fmt.Sscanf(line, "Private_Clean: %d kB", &kib); n == 1 {
			total += kib
		}
	}
	t.Logf("private memory of an anchor: %d KiB", total)
	if total == 0 || total > maxPrivate {
		t.Errorf("private memory = %d KiB; want 1 to %d", total, maxPrivate)
	}
}

// Both architectures' programs, as far as they can be looked at from here.
func TestProgram(t *testing.T) {
	for _, arch := range tinyelf.Architectures() {
		elf, err := tinyelf.LinkFor(arch, data(), write)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d bytes", arch, len(elf))
		if len(elf) > 1024 {
			t.Errorf("%s: program of %d bytes; want at most 1024", arch, len(elf))
		}
	}
}

// The anchor gives up if the shim is gone before it has told it to go on, and
// where it may not change its user.
func TestProgramFails(t *testing.T) {
	podnstest.Root(t)
	exe, err := executable()
	if err != nil {
		t.Fatal(err)
	}
	defer exe.Close()
	for _, tt := range []struct {
		name  string
		input string
		creds *syscall.Credential
	}{
		{name: "end of input"},
		{name: "no privileges", input: "x", creds: &syscall.Credential{Uid: 1, Gid: 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			st, out := runProgram(t, exe, tt.input, tt.creds)
			if st.ExitCode() != 1 || out != "" {
				t.Errorf("ended with %v and output %q; want exit status 1 and none", st, out)
			}
		})
	}
}

func BenchmarkStart(b *testing.B) {
	ns := podnstest.Open(b, podns.Config{})
	root := rootfs(b)
	for b.Loop() {
		a, err := Start(ns, Config{Root: root})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		a.Close()
		b.StartTimer()
	}
}
