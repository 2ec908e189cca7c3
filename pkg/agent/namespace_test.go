package agent_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/agent"
)

// envFolder turns the test binary into PID 1 of a namespace, with its sockets
// in the folder named.
const envFolder = "VMRT_TEST_NAMESPACE"

// buildDir is for what tests build.
var buildDir string

func TestMain(m *testing.M) {
	if dir := os.Getenv(envFolder); dir != "" {
		fmt.Fprintln(os.Stderr, "namespace:", beMachine(dir))
		os.Exit(1)
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	var err error
	if buildDir, err = os.MkdirTemp("", "vmrt-agent-test"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(buildDir)
	return m.Run()
}

// namespace is an agent in namespaces of this machine. It needs root and an
// OCI runtime, no hypervisor.
type namespace struct{ dir string }

func (namespace) cgroups() bool    { return false }
func (namespace) ownRuntime() bool { return false }

func (n namespace) dial(ctx context.Context, port uint32) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", socket(n.dir, port))
}

func socket(dir string, port uint32) string { return filepath.Join(dir, fmt.Sprint(port)) }

// TestNamespace runs the suite against the real task service and runtime.
func TestNamespace(t *testing.T) {
	needRoot(t)
	runtime, busybox := findProgram(t, "crun"), findProgram(t, "busybox")
	dir := t.TempDir()
	if err := makeRoot(filepath.Join(dir, "files"), runtime, busybox); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envFolder+"="+dir)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWNET | syscall.CLONE_NEWCGROUP,
		Pdeathsig:  syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		t.Skipf("make namespaces: %v", err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	n := namespace{dir}
	awaitSocket(t, n)
	suite(t, n)
}

func awaitSocket(t *testing.T, n namespace) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		c, err := n.dial(ctx, api.PortRPC)
		if err == nil {
			c.Close()
			return
		}
		select {
		case <-ctx.Done():
			t.Fatal(err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// findProgram returns a program's path.
func findProgram(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("needs %s: %v", name, err)
	}
	return path
}

// applets are what the containers of the suite run.
var applets = []string{"sh", "sleep", "echo", "cat", "true", "head", "tr", "wc", "ls", "tty", "stty", "hostname", "mkfifo", "grep", "nproc", "dd", "kill", "rm"}

// makeRoot fills dir with what goes over this machine's own root.
func makeRoot(dir, runtime, busybox string) error {
	for _, d := range []string{"rootfs/bin", "rootfs/etc", "rootfs/proc", "rootfs/dev", "rootfs/tmp", "rootfs/sys"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	for _, a := range applets {
		if err := os.Symlink("busybox", filepath.Join(dir, "rootfs/bin", a)); err != nil {
			return err
		}
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "rootfs/etc/passwd"), []byte("root:x:0:0::/:/bin/sh\n"), 0o644),
		copyFile(busybox, filepath.Join(dir, "rootfs/bin/busybox")),
		copyFile(runtime, filepath.Join(dir, "crun")),
	)
}

func copyFile(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o755)
}

// beMachine makes this process, PID 1 of its namespaces, into a machine with
// an agent. It returns only with an error.
func beMachine(dir string) error {
	var listeners [3]net.Listener
	for i, port := range []uint32{api.PortRPC, api.PortStream, api.PortDial} {
		l, err := net.Listen("unix", socket(dir, port))
		if err != nil {
			return err
		}
		listeners[i] = l
	}
	if err := makeMachine(dir); err != nil {
		return err
	}
	return agent.Serve(listeners[0], listeners[1], listeners[2], func() { os.Exit(0) })
}

// makeMachine gives the process a root of its own: this machine's, with the
// test's files above.
func makeMachine(dir string) error {
	root, work := filepath.Join(dir, "root"), filepath.Join(dir, "work")
	for _, d := range []string{root, work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	for _, m := range []struct {
		source, target, fstype string
		flags                  uintptr
		data                   string
	}{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE, ""},
		// Overlays do not stack on every file system: keep the upper in memory.
		{"tmpfs", work, "tmpfs", 0, ""},
		{"overlay", root, "overlay", 0, "lowerdir=/,upperdir=" + work + "/u,workdir=" + work + "/w"},
		{"proc", root + "/proc", "proc", 0, ""},
		{"sysfs", root + "/sys", "sysfs", 0, ""},
		{"/dev", root + "/dev", "", unix.MS_BIND | unix.MS_REC, ""},
		{"cgroup2", root + "/sys/fs/cgroup", "cgroup2", 0, ""},
		{"tmpfs", root + "/run", "tmpfs", 0, ""},
		{"tmpfs", root + "/tmp", "tmpfs", 0, ""},
	} {
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.fstype, m.target, err)
		}
		if m.target == work {
			if err := errors.Join(os.Mkdir(work+"/w", 0o755), os.CopyFS(work+"/u", os.DirFS(dir+"/files"))); err != nil {
				return err
			}
		}
	}
	if err := unix.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the old root: %w", err)
	}
	log.SetLevel("panic") // without controllers the task service complains a lot
	os.Setenv("PATH", "/bin:/sbin:/usr/bin:/usr/sbin")
	os.Remove(api.Runtime)
	return os.Link("/crun", api.Runtime)
}
