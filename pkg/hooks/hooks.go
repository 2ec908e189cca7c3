// Package hooks runs the hooks of an OCI runtime spec in the runtime's
// namespaces, as runc does: prestart, createRuntime, poststart and poststop.
//
// A hook gets the container's state as JSON on stdin, its own arguments and
// environment (this process's when it has none) and the bundle as working
// directory. It leads a process group of its own. When its timeout or the
// context ends, the group is killed; a hook that succeeds may leave processes
// behind. What it prints shows in its error only, shortened.
//
// The functions may be called from any goroutine. A process that left the
// hook's process group is not found again.
package hooks

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	// maxOutput is how much is kept of the end of stdout and of stderr, in bytes.
	maxOutput = 4 << 10
	// outputDelay is how long output is awaited once the hook itself has
	// ended: processes that it left behind may hold its pipes open.
	outputDelay = time.Second
)

// Error is a hook's failure.
type Error struct {
	// Name is the list's name in the spec: "createRuntime". Index is the
	// hook's place in it.
	Name  string
	Index int
	// Path is the hook's program.
	Path string
	// Err wraps *exec.ExitError when the program ran and ended by itself.
	Err error
}

// Error begins with runc's words (libcontainer/configs, Hooks.Run).
func (e *Error) Error() string {
	return fmt.Sprintf("error running %s hook #%d: %v, hook: %s", e.Name, e.Index, e.Err, e.Path)
}

// Unwrap returns Err.
func (e *Error) Unwrap() error { return e.Err }

// Run runs hooks in order until the first failure, which it returns as *Error.
// name is the list's name in the spec.
func Run(ctx context.Context, name string, hooks []specs.Hook, state *specs.State) error {
	for i, h := range hooks {
		if err := run(ctx, h, state); err != nil {
			return &Error{Name: name, Index: i, Path: h.Path, Err: err}
		}
	}
	return nil
}

// RunAll runs all hooks in order, whatever fails, and returns every failure
// joined. So poststop hooks are run (OCI runtime-spec 1.3, runtime.md,
// "Lifecycle").
func RunAll(ctx context.Context, name string, hooks []specs.Hook, state *specs.State) error {
	var errs []error
	for i, h := range hooks {
		if err := run(ctx, h, state); err != nil {
			errs = append(errs, &Error{Name: name, Index: i, Path: h.Path, Err: err})
		}
	}
	return errors.Join(errs...)
}

// run runs one hook.
func run(ctx context.Context, h specs.Hook, state *specs.State) error {
	stdin, err := json.Marshal(state)
	if err != nil {
		return fmt.Errorf("encode state: %w", err)
	}
	hookCtx := ctx
	if h.Timeout != nil {
		var cancel context.CancelFunc
		hookCtx, cancel = context.WithTimeout(ctx, time.Duration(*h.Timeout)*time.Second)
		defer cancel()
	}
	cmd := exec.CommandContext(hookCtx, h.Path)
	if len(h.Args) > 0 {
		cmd.Args = h.Args
	}
	var stdout, stderr tail
	cmd.Env = h.Env
	cmd.Dir = workDir(state.Bundle)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = outputDelay
	cmd.Cancel = func() error {
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		return cmd.Process.Kill()
	}
	err = cmd.Run()
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay):
		return nil // ErrWaitDelay: it succeeded and left a process behind.
	case cmd.Process == nil:
		return err
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case hookCtx.Err() != nil:
		return fmt.Errorf("hook ran past specified timeout of %.1fs", float64(*h.Timeout))
	}
	return fmt.Errorf("%w, stdout: %s, stderr: %s", err, &stdout, &stderr)
}

// workDir returns the bundle, or / when poststop hooks outlive it.
func workDir(bundle string) string {
	if st, err := os.Stat(bundle); err == nil && st.IsDir() {
		return bundle
	}
	return "/"
}

// tail keeps the end of what is written to it.
type tail struct {
	buf []byte
	cut bool
}

func (t *tail) Write(p []byte) (int, error) {
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - maxOutput; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
		t.cut = true
	}
	return len(p), nil
}

func (t *tail) String() string {
	if t.cut {
		return "…" + string(t.buf)
	}
	return string(t.buf)
}
