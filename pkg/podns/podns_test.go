//go:build linux

package podns_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/podns/podnstest"
)

func TestMain(m *testing.M) {
	podnstest.Main(m, map[string]func(){"pod": helperPod})
}

func TestAgainShared(t *testing.T) { podnstest.AgainShared(t) }

func do(t *testing.T, ns *podns.Namespaces, f func() error) {
	t.Helper()
	if err := ns.Do(t.Context(), f); err != nil {
		t.Fatal(err)
	}
}

func mountTmpfs(dir string) error { return unix.Mount("pod", dir, "tmpfs", 0, "size=1m") }

func TestMountsStayInThePod(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{})
	dir := t.TempDir()
	host := podnstest.Mounts(t, "/proc/self")
	var pod []string
	do(t, ns, func() error {
		if err := mountTmpfs(dir); err != nil {
			return err
		}
		pod = podnstest.Mounts(t, "/proc/thread-self")
		return os.WriteFile(filepath.Join(dir, "inside"), nil, 0o600)
	})
	if got, want := len(pod), len(host)+1; got != want {
		t.Errorf("the pod has %d mounts; want %d", got, want)
	}
	if diff := cmp.Diff(host, podnstest.Mounts(t, "/proc/self")); diff != "" {
		t.Errorf("mounts of the host changed (-before +after):\n%s", diff)
	}
	if _, err := os.Stat(filepath.Join(dir, "inside")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Stat of a file on the pod's mount, from the host = %v; want not exist", err)
	}
}

// A host whose mounts are shared shows the pod what it mounts and unmounts.
func TestSharedHostMountsArrive(t *testing.T) {
	podnstest.Root(t)
	dir := t.TempDir()
	if b, err := os.ReadFile("/proc/self/mountinfo"); err != nil || !strings.Contains(string(b), " shared:") {
		t.Skipf("the mounts of the host are not shared (%v); TestAgainShared runs this", err)
	}
	ns := podnstest.Open(t, podns.Config{})
	inside := func() (found bool) {
		do(t, ns, func() error {
			for _, m := range podnstest.Mounts(t, "/proc/thread-self") {
				found = found || strings.Contains(m, dir)
			}
			return nil
		})
		return found
	}
	if err := mountTmpfs(dir); err != nil {
		t.Fatal(err)
	}
	if !inside() {
		t.Error("a mount that the host made later is not in the pod")
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	if inside() {
		t.Error("a mount that the host undid is still in the pod")
	}
}

func namespace(t *testing.T, path string) string {
	t.Helper()
	s, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestNewNetwork(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{})
	if got, host := namespace(t, ns.NetPath()), namespace(t, "/proc/self/ns/net"); got == host {
		t.Errorf("the pod's network namespace is %s, the host's", got)
	}
	do(t, ns, func() error {
		ifs, err := net.Interfaces()
		if err != nil {
			return err
		}
		if len(ifs) != 1 || ifs[0].Name != "lo" || ifs[0].Flags&net.FlagUp == 0 {
			t.Errorf("interfaces of a new network namespace = %v; want lo, up", ifs)
		}
		return nil
	})
}

func TestNetworkByPath(t *testing.T) {
	first := podnstest.Open(t, podns.Config{})
	second := podnstest.Open(t, podns.Config{NetNS: first.NetPath()})
	if got, want := namespace(t, second.NetPath()), namespace(t, first.NetPath()); got != want {
		t.Errorf("NetPath() names %s; want %s", got, want)
	}
	third := podnstest.Open(t, podns.Config{})
	if err := third.SetNet(first.NetPath()); err != nil {
		t.Fatal(err)
	}
	f, err := third.Net()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got, want := namespace(t, fmt.Sprintf("/proc/self/fd/%d", f.Fd())), namespace(t, first.NetPath()); got != want {
		t.Errorf("after SetNet, Net() is %s; want %s", got, want)
	}
	if got, want := namespace(t, fmt.Sprintf("/proc/self/fd/%d", f.Fd())), namespace(t, third.NetPath()); got != want {
		t.Errorf("Net() is %s, NetPath() names %s", got, want)
	}
	m, err := third.Mount()
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if got, want := namespace(t, fmt.Sprintf("/proc/self/fd/%d", m.Fd())), namespace(t, third.MountPath()); got != want {
		t.Errorf("Mount() is %s, MountPath() names %s", got, want)
	}
}

func TestBadNetwork(t *testing.T) {
	podnstest.Root(t)
	for _, path := range []string{"/nonexistent", "/dev/null", "/proc/self/ns/mnt"} {
		if ns, err := podns.Open(podns.Config{NetNS: path}); err == nil {
			ns.Close()
			t.Errorf("Open(NetNS: %q) = nil; want an error", path)
		} else if !strings.Contains(err.Error(), path) {
			t.Errorf("Open(NetNS: %q) = %q; want the path in it", path, err)
		} else if !errdefs.IsFailedPrecondition(err) {
			t.Errorf("Open(NetNS: %q) = %q; want a failed precondition", path, err)
		}
	}
	ns := podnstest.Open(t, podns.Config{})
	for _, path := range []string{"", "/dev/null"} {
		if err := ns.SetNet(path); err == nil {
			t.Errorf("SetNet(%q) = nil; want an error", path)
		}
	}
}

func sleeper(t *testing.T) *exec.Cmd {
	t.Helper()
	path, err := exec.LookPath("sleep")
	if err != nil {
		t.Skip("needs sleep(1)")
	}
	return exec.Command(path, "1000")
}

func TestProcess(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{})
	p, err := ns.StartProcess(sleeper(t))
	if err != nil {
		t.Fatal(err)
	}
	proc := fmt.Sprintf("/proc/%d/ns/", p.Pid())
	if got, want := namespace(t, proc+"net"), namespace(t, ns.NetPath()); got != want {
		t.Errorf("the process is in %s; want %s", got, want)
	}
	if got, want := namespace(t, proc+"mnt"), namespace(t, ns.MountPath()); got != want {
		t.Errorf("the process is in %s; want %s", got, want)
	}
	var inside string
	err = p.InMounts(func() error {
		inside, err = os.Readlink("/proc/thread-self/ns/mnt")
		return err
	})
	if want := namespace(t, ns.MountPath()); err != nil || inside != want {
		t.Errorf("InMounts runs in %s, %v; want %s", inside, err, want)
	}
	if st := p.Status(); st != 0 {
		t.Errorf("Status() of a live process = %v; want 0", st)
	}
	if err := p.Signal(unix.SIGTERM); err != nil {
		t.Errorf("Signal(SIGTERM) = %v; want nil", err)
	}
	podnstest.Receive(t, "the end of the process", p.Done())
	if st := p.Status(); !st.Signaled() || st.Signal() != unix.SIGTERM {
		t.Errorf("Status() = %#x; want ended by SIGTERM", st)
	}
	if err := p.Signal(unix.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("Signal after the end = %v; want %v", err, os.ErrProcessDone)
	}
	if err := p.InMounts(func() error { return nil }); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("InMounts after the end = %v; want %v", err, os.ErrProcessDone)
	}
	p.Kill()
}

func TestProcessExitStatus(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{})
	p, err := ns.StartProcess(exec.Command("/bin/sh", "-c", "exit 7"))
	if err != nil {
		t.Fatal(err)
	}
	podnstest.Receive(t, "the end of the process", p.Done())
	if st := p.Status(); !st.Exited() || st.ExitStatus() != 7 {
		t.Errorf("Status() = %#x; want exit status 7", st)
	}
	if _, err := ns.StartProcess(exec.Command("/nonexistent")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("StartProcess(/nonexistent) = %v; want not exist", err)
	}
}

// One goroutine and no thread waits for a process.
func TestProcessesNeedNoThread(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{})
	const n = 30
	var ps []*podns.Process
	for range n {
		p, err := ns.StartProcess(sleeper(t))
		if err != nil {
			t.Fatal(err)
		}
		ps = append(ps, p)
	}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	if len(tasks) >= n {
		t.Errorf("with %d processes there are %d threads; want fewer", n, len(tasks))
	}
	for _, p := range ps {
		p.Kill()
		p.Kill()
	}
}

func TestCloseKills(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{})
	p, err := ns.StartProcess(sleeper(t))
	if err != nil {
		t.Fatal(err)
	}
	ns.Close()
	podnstest.Receive(t, "the end of the process", p.Done())
	if st := p.Status(); !st.Signaled() || st.Signal() != unix.SIGKILL {
		t.Errorf("Status() = %#x; want ended by SIGKILL", st)
	}
	if err := ns.Do(t.Context(), func() error { return nil }); !errors.Is(err, podns.ErrClosed) {
		t.Errorf("Do after Close = %v; want %v", err, podns.ErrClosed)
	}
	if err := ns.Start(sleeper(t)); !errors.Is(err, podns.ErrClosed) {
		t.Errorf("Start after Close = %v; want %v", err, podns.ErrClosed)
	}
	if err := ns.Close(); err != nil {
		t.Errorf("second Close() = %v; want nil", err)
	}
}

func TestDoGivesUpWaiting(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{})
	busy, release := make(chan struct{}), make(chan struct{})
	first := make(chan error)
	go func() {
		first <- ns.Do(context.Background(), func() error {
			close(busy)
			<-release
			return errors.New("own error")
		})
	}()
	<-busy
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	err := ns.Do(ctx, func() error { t.Error("ran although its context had ended"); return nil })
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Do on a busy thread = %v; want %v", err, context.DeadlineExceeded)
	}
	close(release)
	if err := <-first; err == nil || err.Error() != "own error" {
		t.Errorf("Do = %v; want the function's own error", err)
	}
}

func TestManyPods(t *testing.T) {
	podnstest.Open(t, podns.Config{}) // checks for leaks
	for range 40 {
		ns, err := podns.Open(podns.Config{})
		if err != nil {
			t.Fatal(err)
		}
		do(t, ns, func() error {
			if unix.Gettid() == unix.Getpid() {
				t.Error("a pod took the process's first thread")
			}
			return nil
		})
		ns.Close()
	}
}

// helperPod holds a pod with a mount at $DIR and a process, and says so.
func helperPod() {
	ns, err := podns.Open(podns.Config{})
	if err == nil {
		err = ns.Do(context.Background(), func() error { return mountTmpfs(os.Getenv("DIR")) })
	}
	var pids []any
	for range 2 {
		cmd := exec.Command("/bin/sleep", "1000")
		if err == nil {
			err = ns.Start(cmd)
		}
		if err == nil {
			pids = append(pids, cmd.Process.Pid)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(pids...)
	select {}
}

// Killing the process that holds a pod ends the pod's processes and mounts.
func TestKill9(t *testing.T) {
	podnstest.Root(t)
	sleeper(t)
	dir := t.TempDir()
	cmd := podnstest.Helper("pod")
	cmd.Env = append(cmd.Env, "DIR="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	var pids [2]int
	if _, err := fmt.Sscan(line, &pids[0], &pids[1]); err != nil {
		t.Fatalf("helper says %q: %v", line, err)
	}
	var pidfds []int
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		pidfds = append(pidfds, fd)
	}
	// A watch does not keep the file system mounted, and tells its end.
	watch, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(watch)
	if _, err := unix.InotifyAddWatch(watch, fmt.Sprintf("/proc/%d/root%s", pids[0], dir), unix.IN_UNMOUNT); err != nil {
		t.Fatal(err)
	}

	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for i, fd := range append(pidfds, watch) {
		if !podnstest.Readable(t, fd) {
			t.Errorf("after kill -9, event %d of 3 (two processes, one mount) did not come", i)
		}
	}
}

func BenchmarkOpen(b *testing.B) {
	podnstest.Root(b)
	for b.Loop() {
		ns, err := podns.Open(podns.Config{})
		if err != nil {
			b.Fatal(err)
		}
		ns.Close()
	}
}

func BenchmarkDo(b *testing.B) {
	ns := podnstest.Open(b, podns.Config{})
	for b.Loop() {
		if err := ns.Do(context.Background(), func() error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}
