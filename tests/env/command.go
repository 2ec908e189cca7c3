package env

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Cmd is a command that runs inside the environment. Process is that of the
// program which enters the namespaces, so use Signal, not Process.Signal.
type Cmd struct {
	*exec.Cmd
}

// Command returns a command that will run inside. When ctx ends first, the
// command's process group is killed.
func (e *Env) Command(ctx context.Context, name string, args ...string) *Cmd {
	argv := e.ns.enterArgs(append([]string{name}, args...))
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = e.environ()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error {
		err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		if errors.Is(err, syscall.ESRCH) {
			return os.ErrProcessDone
		}
		return err
	}
	// Children that keep the output open do not delay Wait for ever.
	cmd.WaitDelay = 5 * time.Second
	return &Cmd{cmd}
}

// Ctr returns a ctr command on the environment's containerd.
func (e *Env) Ctr(ctx context.Context, args ...string) *Cmd { return e.Command(ctx, "ctr", args...) }

// Nerdctl returns a nerdctl command on the environment's containerd. Config
// must have named the tool.
func (e *Env) Nerdctl(ctx context.Context, args ...string) *Cmd {
	return e.Command(ctx, "nerdctl", args...)
}

// environ is the environment of every process inside.
func (e *Env) environ() []string {
	return []string{
		"PATH=" + strings.Join(e.path, ":"),
		"HOME=" + e.Dir,
		"LANG=C.UTF-8",
		"CONTAINERD_ADDRESS=" + e.Socket,
		"CONTAINERD_NAMESPACE=default",
		"VMRT_CONFIG=" + e.vmrtConfig(),
		"NERDCTL_TOML=" + e.nerdctlConfig(),
		"CONTAINER_RUNTIME_ENDPOINT=unix://" + e.Socket,
		"CRI_CONFIG_FILE=" + e.crictlConfig(),
		"DOCKER_HOST=unix://" + e.dockerSocket(),
	}
}

// Signal sends a signal to the command itself. It returns os.ErrProcessDone
// when the command has ended.
func (c *Cmd) Signal(sig syscall.Signal) error {
	if c.Process == nil {
		return errors.New("signal a command that was not started")
	}
	pids, err := children(c.Process.Pid)
	if err != nil {
		return err
	}
	if len(pids) == 0 {
		return os.ErrProcessDone
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			return err
		}
	}
	return nil
}

// children returns the pids of a process's children.
func children(pid int) ([]int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, f := range strings.Fields(string(b)) {
		var child int
		if _, err := fmt.Sscan(f, &child); err != nil {
			return nil, err
		}
		pids = append(pids, child)
	}
	return pids, nil
}

// Run runs the command and returns its standard output. The error holds the
// command's standard error.
func (c *Cmd) Run() (stdout string, err error) {
	var out, errOut bytes.Buffer
	c.Stdout, c.Stderr = &out, &errOut
	if err := c.Cmd.Run(); err != nil {
		return out.String(), &RunError{Args: c.Args, Stderr: errOut.String(), Err: err}
	}
	return out.String(), nil
}

// RunError is a command that failed.
type RunError struct {
	// Args is the whole command line.
	Args []string
	// Stderr is what the command wrote to standard error.
	Stderr string
	// Err is *exec.ExitError when the command ran.
	Err error
}

func (e *RunError) Error() string {
	args := e.Args
	for i, a := range args { // leave out how the namespaces are entered
		if a == "--" {
			args = args[i+1:]
			break
		}
	}
	return fmt.Sprintf("run %s: %v: %s", strings.Join(args, " "), e.Err, strings.TrimSpace(e.Stderr))
}

func (e *RunError) Unwrap() error { return e.Err }

// ExitCode returns the code of a command that ran and ended by itself, 0 for
// nil and -1 for any other error.
func ExitCode(err error) int {
	if err == nil {
		return 0
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return -1
}

// LookPath returns the path of a program that commands find by its name.
func (e *Env) LookPath(name string) (string, error) {
	for _, dir := range e.path {
		file := filepath.Join(dir, name)
		if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("find %s in %s: %w", name, strings.Join(e.path, ":"), exec.ErrNotFound)
}
