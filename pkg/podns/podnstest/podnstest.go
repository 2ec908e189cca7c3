//go:build linux

// Package podnstest helps tests that make namespaces, mounts and processes:
// they skip themselves where they cannot run, and fail when they leave
// something behind. For tests only.
package podnstest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/pprof"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/podns"
)

// patience bounds the wait for what ends by itself.
const patience = 20 * time.Second

// Open returns new namespaces that are closed when the test ends. It skips the
// test unless the process may make them, and fails it if it leaves descriptors,
// goroutines, threads, child processes or mounts of the host behind.
func Open(tb testing.TB, cfg podns.Config) *podns.Namespaces {
	tb.Helper()
	Root(tb)
	checkLeaks(tb)
	ns, err := podns.Open(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := ns.Close(); err != nil {
			tb.Errorf("Close() = %v; want nil", err)
		}
	})
	return ns
}

// Root skips the test unless the process may make mount namespaces.
func Root(tb testing.TB) {
	tb.Helper()
	if !privileged() {
		tb.Skip("needs root: CAP_SYS_ADMIN to make namespaces")
	}
}

func privileged() bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	err := unix.Capget(&hdr, &data[0])
	return err == nil && data[0].Effective&(1<<unix.CAP_SYS_ADMIN) != 0
}

// Wait calls ok until it returns true. It is for what the kernel tells nobody;
// everything else has a channel to wait for.
func Wait(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatalf("after %v still waiting for %s", patience, what)
		}
	}
}

// Receive returns when c is closed or has a value.
func Receive[T any](tb testing.TB, what string, c <-chan T) {
	tb.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		tb.Fatalf("after %v still waiting for %s", patience, what)
	}
}

// Readable waits until fd can be read, which for a pidfd says that the process
// has ended, and reports whether that came.
func Readable(tb testing.TB, fd int) bool {
	tb.Helper()
	for end := time.Now().Add(patience); ; {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, int(max(0, time.Until(end)).Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			tb.Fatal("poll: ", err)
		}
		return n == 1
	}
}

// Mounts returns the mounts of the mount namespace of the process or thread at
// proc ("/proc/self"), one a line, without what differs between two namespaces:
// ids and peer groups.
func Mounts(tb testing.TB, proc string) []string {
	tb.Helper()
	b, err := os.ReadFile(proc + "/mountinfo")
	if err != nil {
		tb.Fatal(err)
	}
	var mounts []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 7 {
			tb.Fatalf("mountinfo line %q: too short", line)
		}
		mounts = append(mounts, strings.Join(f[2:6], " "))
	}
	return mounts
}

type state struct {
	fds, threads int
	children     int
	mounts       []string
	goroutines   int
}

func observe(tb testing.TB) state {
	count := func(dir string) int {
		d, err := os.ReadDir(dir)
		if err != nil {
			tb.Fatal(err)
		}
		return len(d)
	}
	children := 0
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		tb.Fatal(err)
	}
	for _, t := range tasks {
		b, _ := os.ReadFile("/proc/self/task/" + t.Name() + "/children") // it may have ended
		children += len(bytes.Fields(b))
	}
	return state{
		fds:        count("/proc/self/fd"),
		threads:    len(tasks),
		children:   children,
		mounts:     Mounts(tb, "/proc/self"),
		goroutines: runtime.NumGoroutine(),
	}
}

// slackThreads is how many threads Go's runtime may start for itself in a test.
const slackThreads = 8

func checkLeaks(tb testing.TB) {
	before := observe(tb)
	tb.Cleanup(func() {
		if tb.Failed() {
			return
		}
		var after state
		for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
			after = observe(tb)
			if after.fds <= before.fds && after.children <= before.children &&
				after.goroutines <= before.goroutines && after.threads <= before.threads+slackThreads {
				break
			}
			if time.Now().After(end) {
				var stacks bytes.Buffer
				_ = pprof.Lookup("goroutine").WriteTo(&stacks, 1)
				tb.Errorf("left behind: %d descriptors, %d children, %d goroutines, %d threads; want at most %d, %d, %d, %d\n%s",
					after.fds, after.children, after.goroutines, after.threads,
					before.fds, before.children, before.goroutines, before.threads+slackThreads, &stacks)
				break
			}
		}
		if diff := cmp.Diff(before.mounts, after.mounts); diff != "" {
			tb.Errorf("mounts of the host changed (-before +after):\n%s", diff)
		}
	})
}

// envMounts says what the mounts are like in which the tests run; envHelper
// names a helper that is to run instead.
const (
	envMounts = "VMRT_TEST_MOUNTS"
	envHelper = "VMRT_TEST_HELPER"

	private = "private"
	shared  = "shared"
)

// Main replaces m.Run in TestMain. For root it runs the tests in a mount
// namespace of their own, which other tests leave alone and which AgainShared
// makes another of.
func Main(m *testing.M, helpers map[string]func()) {
	if name := os.Getenv(envHelper); name != "" {
		helpers[name]()
		os.Exit(0)
	}
	switch os.Getenv(envMounts) {
	case "":
		if privileged() {
			os.Exit(again(private, os.Stdout, os.Args[1:]))
		}
	case shared:
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
			fmt.Fprintln(os.Stderr, "make mounts shared:", err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// again runs this program in a new mount namespace and returns its exit code.
func again(mounts string, out io.Writer, args []string) int {
	// The parent-death signal is the thread's.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), envMounts+"="+mounts)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		fmt.Fprintln(out, "run tests in a new mount namespace:", err)
		return 1
	}
	return cmd.ProcessState.ExitCode()
}

// AgainShared runs the package's short tests again, in a mount namespace whose
// mounts are shared, as a host's are that runs systemd.
func AgainShared(t *testing.T) {
	t.Helper()
	Root(t)
	if os.Getenv(envMounts) == shared {
		t.Skip("this is that run")
	}
	var out bytes.Buffer
	if code := again(shared, &out, []string{"-test.v", "-test.short", "-test.timeout=5m"}); code != 0 {
		t.Errorf("tests with shared mounts: exit status %d\n%s", code, &out)
	}
}

// Helper returns a command that runs the function which was given to Main by
// name, in a process of its own.
func Helper(name string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), envHelper+"="+name)
	cmd.Stderr = os.Stderr
	return cmd
}
