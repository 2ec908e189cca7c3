package env

import (
	"bufio"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

//go:embed init.sh
var initScript string

// namespaces is a set of mount, network, IPC, PID and cgroup namespaces, kept by a
// shell that is PID 1 of it. The shell ends when its standard input does, so
// the set never outlives this process.
type namespaces struct {
	init  *exec.Cmd
	input io.Closer
	done  chan struct{} // closed when init was reaped
}

// newNamespaces makes the set. dir is a folder for what the inside writes to
// /var/lib.
func newNamespaces(dir string, cg *cgroups) (_ *namespaces, err error) {
	for _, d := range []string{"var-lib", "var-lib-work"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	// The first shell waits until it is in its cgroups, because they become
	// the root of the cgroup namespace; the script then runs in its place.
	const first = `read -r go && exec unshare --cgroup sh -ec "$1" init "$2"`
	cmd := exec.Command("sh", "-ec", first, "sh", initScript+cg.mountScript()+keepScript, dir)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "RESOLV_CONF=" + resolvConf()}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC,
		Setsid:     true,
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("make namespaces: %w", err)
	}
	ns := &namespaces{init: cmd, input: stdin, done: make(chan struct{})}
	fail := func(err error) (*namespaces, error) {
		stdin.Close()
		werr := cmd.Wait()
		return nil, fmt.Errorf("make namespaces: %w (%v): %s", err, werr, stderr.String())
	}
	if err := cg.enter(cmd.Process.Pid); err != nil {
		return fail(err)
	}
	if _, err := io.WriteString(stdin, "go\n"); err != nil {
		return fail(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "ready\n" {
		return fail(errors.Join(err, fmt.Errorf("init says %q", line)))
	}
	if err := cg.delegate(); err != nil {
		return fail(err)
	}
	go func() {
		defer close(ns.done)
		_ = cmd.Wait() // its end is all that counts: it is always killed
	}()
	return ns, nil
}

// keepScript ends init.sh: it reaps orphans until standard input ends. (A
// command in the background has no standard input of its own.)
const keepScript = `
exec 3<&0
echo ready
cat <&3 >/dev/null &
wait
`

// pid returns init's pid outside.
func (ns *namespaces) pid() int { return ns.init.Process.Pid }

func (ns *namespaces) path(inside string) string {
	return filepath.Join("/proc", strconv.Itoa(ns.pid()), "root") + inside
}

// close kills every process inside. The kernel reaps them before init's own
// end is reported.
func (ns *namespaces) close() error {
	ns.input.Close()
	if err := ns.init.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill init of the environment: %w", err)
	}
	<-ns.done
	return nil
}

// enterArgs is the command line that runs a program inside.
func (ns *namespaces) enterArgs(args []string) []string {
	return append([]string{
		"nsenter", "--target", strconv.Itoa(ns.pid()), "--mount", "--net", "--ipc", "--pid", "--cgroup", "--",
	}, args...)
}

// onNetwork runs f on a thread that is in the network namespace. A socket that
// f opens stays there.
func (ns *namespaces) onNetwork(f func() error) error {
	inside, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", ns.pid()))
	if err != nil {
		return err
	}
	defer inside.Close()
	runtime.LockOSThread()
	outside, err := os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer outside.Close()
	if err := unix.Setns(int(inside.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace: %w", err)
	}
	err = f()
	if back := unix.Setns(int(outside.Fd()), unix.CLONE_NEWNET); back != nil {
		// The thread stays locked, so that nothing else runs on it.
		return errors.Join(err, fmt.Errorf("leave network namespace: %w", back))
	}
	runtime.UnlockOSThread()
	return err
}

// resolvConf returns where the content of /etc/resolv.conf must be put inside
// when the file is a link into /run, and "" otherwise.
func resolvConf() string {
	target, err := filepath.EvalSymlinks("/etc/resolv.conf")
	if err != nil || !strings.HasPrefix(target, "/run/") {
		return ""
	}
	return target
}
