package pod

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/sys/reaper"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/agent/userns"
	"github.com/vmrt/vmrt/pkg/idmap"
)

// envInside tells a copy of the test that it runs in namespaces of its own.
const envInside = "VMRT_TEST_POD"

func TestMain(m *testing.M) {
	if os.Getenv(envInside) == "" {
		os.Exit(m.Run())
	}
	signals := make(chan os.Signal, 32)
	signal.Notify(signals, unix.SIGCHLD)
	go func() {
		for range signals {
			reaper.Reap()
		}
	}()
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		panic(err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// TestPod runs as the first process of its own namespaces, as the agent does.
func TestPod(t *testing.T) {
	if os.Getenv(envInside) != "" {
		t.Run("OpenClose", testOpenClose)
		t.Run("UserNamespace", testUserNamespace)
		t.Run("ErrorsLeaveNothing", testErrorsLeaveNothing)
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root to make namespaces")
	}
	cmd := exec.Command("/proc/self/exe", "-test.v", "-test.run", "^TestPod$")
	cmd.Env = append(os.Environ(), envInside+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWNET,
		Pdeathsig:  syscall.SIGKILL,
	}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil || !strings.Contains(string(out), "--- PASS: TestPod/ErrorsLeaveNothing") {
		t.Fatalf("in namespaces: %v", err)
	}
}

func newPod(t *testing.T) *Pod {
	t.Helper()
	dir := t.TempDir()
	// As the guest's are: the root of a user namespace may pass.
	for _, d := range []string{filepath.Dir(dir), dir} {
		if err := os.Chmod(d, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	return &Pod{namespaces: filepath.Join(dir, "ns"), shm: filepath.Join(dir, "shm")}
}

// inside runs a program in the pod's namespaces.
func (p *Pod) inside(t *testing.T, script string) string {
	t.Helper()
	out, err := exec.Command("nsenter", "--ipc="+p.namespaces+"/ipc", "--uts="+p.namespaces+"/uts", "sh", "-c", script).CombinedOutput()
	if err != nil && !strings.Contains(err.Error(), "no child processes") {
		t.Fatalf("%s in the pod: %v: %s", script, err, out)
	}
	return strings.TrimSpace(string(out))
}

func mounts(t *testing.T, dir string) (n int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), dir)
}

func testOpenClose(t *testing.T) {
	p := newPod(t)
	r := &api.OpenPodRequest{
		Hostname: "web-0", Domainname: "example.org", Pid: true, ShmBytes: 1 << 20,
		Sysctls: map[string]string{"kernel.msgmax": "12345", "net.ipv4.ip_unprivileged_port_start": "77"},
	}
	if err := p.Open(r); err != nil {
		t.Fatal(err)
	}
	if got := p.inside(t, "hostname; cat /proc/sys/kernel/domainname /proc/sys/kernel/msgmax"); got != "web-0\nexample.org\n12345" {
		t.Errorf("in the pod = %q; want web-0, example.org, 12345", got)
	}
	if own, err := os.ReadFile("/proc/sys/kernel/msgmax"); err != nil || strings.TrimSpace(string(own)) == "12345" {
		t.Errorf("msgmax outside = %s, %v; want it unchanged", own, err)
	}
	if port, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start"); err != nil || strings.TrimSpace(string(port)) != "77" {
		t.Errorf("port = %s, %v; want the network's, 77", port, err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(p.shm, &st); err != nil || st.Type != unix.TMPFS_MAGIC || st.Blocks*uint64(st.Bsize) != 1<<20 {
		t.Errorf("shm = %+v, %v; want a tmpfs of 1 MiB", st, err)
	}
	pid := p.init.Pid
	if cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err != nil || string(cmdline) != "/pause\x00" {
		t.Errorf("first process = %q, %v; want /pause", cmdline, err)
	}
	checkPause(t, pid)
	if err := p.Open(r); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second Open = %v; want already exists", err)
	}
	for range 2 {
		if err := p.Close(); err != nil {
			t.Errorf("Close = %v; want nil", err)
		}
	}
	if n := mounts(t, filepath.Dir(p.shm)); n != 0 {
		t.Errorf("%d mounts are left", n)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
		t.Error("the first process is left")
	}
	// It can be opened again.
	if err := p.Open(&api.OpenPodRequest{}); err != nil {
		t.Errorf("Open after Close = %v; want nil", err)
	}
	p.Close()
}

// checkPause: who shares the pid namespace finds nothing in its first process.
func checkPause(t *testing.T, pid int) {
	t.Helper()
	status := func() string {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(strings.Fields(string(b)), " ")
	}
	// What it does first takes no time, but nobody waits for it.
	for deadline := time.Now().Add(10 * time.Second); !strings.Contains(status(), "CapPrm: 0000000000000000 CapEff: 0000000000000000"); {
		if time.Now().After(deadline) {
			t.Fatalf("first process keeps its capabilities: %s", status())
		}
		time.Sleep(time.Millisecond)
	}
	if !strings.Contains(status(), "NoNewPrivs: 1") {
		t.Errorf("first process may gain privileges: %s", status())
	}
	for _, dir := range []string{"root", "root/..", "root/../../..", "cwd/.."} {
		if names, err := filepath.Glob(fmt.Sprintf("/proc/%d/%s/*", pid, dir)); err != nil || len(names) > 0 {
			t.Errorf("%s of the first process has %v, %v; want nothing", dir, names, err)
		}
	}
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil || strings.Count(string(mounts), "\n") != 1 {
		t.Errorf("mounts of the first process = %s, %v; want its root alone", mounts, err)
	}
}

// testUserNamespace: the namespaces are there already, and what they hold is
// the business of their root.
func testUserNamespace(t *testing.T) {
	p := newPod(t)
	p.ids = idmap.Mapping{
		UIDs: []specs.LinuxIDMapping{{HostID: 1000, Size: 10}},
		GIDs: []specs.LinuxIDMapping{{HostID: 2000, Size: 10}},
	}
	pid, err := userns.Make(p.ids, p.namespaces)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, kind := range []string{"user", "ipc", "uts", "pid"} {
			if err := unix.Unmount(p.namespaces+"/"+kind, 0); err != nil {
				t.Error(err)
			}
		}
	})
	first, err := os.FindProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	made := New(p.ids, first)
	p.init, p.ended = made.init, made.ended
	r := &api.OpenPodRequest{
		Hostname: "web-0", Pid: true, ShmBytes: 1 << 20,
		Sysctls: map[string]string{"kernel.msgmax": "12345", "net.ipv4.ip_unprivileged_port_start": "78"},
	}
	if err := p.Open(r); err != nil {
		t.Fatal(err)
	}
	if got := p.inside(t, "hostname; cat /proc/sys/kernel/msgmax"); got != "web-0\n12345" {
		t.Errorf("in the pod = %q; want web-0, 12345", got)
	}
	var st unix.Stat_t
	if err := unix.Stat(p.shm, &st); err != nil || st.Uid != 1000 || st.Gid != 2000 {
		t.Errorf("shm is %d:%d's, %v; want 1000:2000's", st.Uid, st.Gid, err)
	}
	for path, want := range map[string]string{"uid_map": "0 1000 10", "gid_map": "0 2000 10", "setgroups": "allow"} {
		got, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, path))
		if err != nil || strings.Join(strings.Fields(string(got)), " ") != want {
			t.Errorf("%s of the first process = %q, %v; want %s", path, got, err, want)
		}
	}
	checkPause(t, pid)
	user, err := os.Stat(p.namespaces + "/user")
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"ipc", "uts", "pid"} {
		f, err := os.Open(p.namespaces + "/" + kind)
		if err != nil {
			t.Fatal(err)
		}
		owner, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_USERNS)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		file := os.NewFile(uintptr(owner), "user namespace")
		if fi, err := file.Stat(); err != nil || !os.SameFile(fi, user) {
			t.Errorf("%s namespace belongs to another user namespace (%v)", kind, err)
		}
		file.Close()
	}
	if err := p.Close(); err != nil {
		t.Errorf("Close = %v; want nil", err)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
		t.Error("the first process is left")
	}
	if err := p.Open(r); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("Open after Close = %v; want a failed precondition", err)
	}
	if _, err := userns.Make(idmap.Mapping{UIDs: p.ids.UIDs}, p.namespaces); err == nil {
		t.Error("a user namespace without groups was made")
	}
}

func testErrorsLeaveNothing(t *testing.T) {
	p := newPod(t)
	many := map[string]string{}
	for i := range maxSysctls + 1 {
		many[fmt.Sprint("kernel.x", i)] = "1"
	}
	for name, r := range map[string]*api.OpenPodRequest{
		"unknown sysctl":     {Sysctls: map[string]string{"kernel.no_such": "1"}},
		"sysctl outside":     {Sysctls: map[string]string{"../../etc/passwd": "1"}},
		"sysctl above":       {Sysctls: map[string]string{"net/../../1/oom_score_adj": "1"}},
		"refused value":      {Sysctls: map[string]string{"kernel.msgmax": "x"}},
		"too many":           {Sysctls: many},
		"host name too long": {Hostname: strings.Repeat("x", 65)},
	} {
		if err := p.Open(r); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Open with %s = %v; want an invalid argument", name, err)
		}
		if n := mounts(t, filepath.Dir(p.shm)); n != 0 || p.init != nil {
			t.Errorf("Open with %s leaves %d mounts, process %v", name, n, p.init)
		}
	}
}
