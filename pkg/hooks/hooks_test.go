package hooks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// script writes an executable shell script and returns its path.
func script(t *testing.T, body string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "hook")
	if err := os.WriteFile(name, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return name
}

func state(t *testing.T) *specs.State {
	t.Helper()
	return &specs.State{
		Version: "1.3.0", ID: "web", Status: specs.StateCreating, Pid: 42, Bundle: t.TempDir(),
		Annotations: map[string]string{"a": "b"},
	}
}

func timeout(seconds int) *int { return &seconds }

func TestRunPassesEverything(t *testing.T) {
	st := state(t)
	hook := script(t, `cat > state; echo "$0 $1 $2" > args; echo "$A $HOME" > env; pwd > cwd`)
	h := specs.Hook{Path: hook, Args: []string{"name", "one", "two"}, Env: []string{"A=1", "PATH=/usr/bin:/bin"}}
	if err := Run(t.Context(), "createRuntime", []specs.Hook{h}, st); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, name := range []string{"state", "args", "env", "cwd"} {
		b, err := os.ReadFile(filepath.Join(st.Bundle, name))
		if err != nil {
			t.Fatal(err)
		}
		got[name] = string(b)
	}
	want := map[string]string{
		"state": fmt.Sprintf(`{"ociVersion":"1.3.0","id":"web","status":"creating","pid":42,"bundle":%q,"annotations":{"a":"b"}}`, st.Bundle),
		// The shell names its script, not argv[0].
		"args": hook + " one two\n",
		"env":  "1 \n",
		"cwd":  st.Bundle + "\n",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("what the hook saw (-want +got):\n%s", diff)
	}
}

func TestRunInheritsEnvironment(t *testing.T) {
	t.Setenv("HOOKS_TEST", "inherited")
	if err := Run(t.Context(), "poststart", []specs.Hook{{Path: script(t, `test "$HOOKS_TEST" = inherited`)}}, state(t)); err != nil {
		t.Error(err)
	}
}

func TestRunWithoutBundle(t *testing.T) {
	st := state(t)
	st.Bundle = filepath.Join(st.Bundle, "gone")
	if err := Run(t.Context(), "poststop", []specs.Hook{{Path: script(t, `test "$(pwd)" = /`)}}, st); err != nil {
		t.Error(err)
	}
}

func TestRunStopsAtFirstFailure(t *testing.T) {
	st := state(t)
	fail := script(t, "echo out; echo err >&2; exit 3")
	hooks := []specs.Hook{{Path: script(t, "echo 1 >> ran")}, {Path: fail}, {Path: script(t, "echo 3 >> ran")}}
	err := Run(t.Context(), "createRuntime", hooks, st)
	want := "error running createRuntime hook #1: exit status 3, stdout: out\n, stderr: err\n, hook: " + fail
	if err == nil || err.Error() != want {
		t.Errorf("Run() = %v; want %s", err, want)
	}
	var hookErr *Error
	var exit *exec.ExitError
	if !errors.As(err, &hookErr) || hookErr.Index != 1 || !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("Run() = %#v; want an *Error with index 1 and an ExitError with code 3", err)
	}
	if b, err := os.ReadFile(filepath.Join(st.Bundle, "ran")); string(b) != "1\n" {
		t.Errorf("ran %q, error %v; want the first alone", b, err)
	}
}

func TestRunAllGoesOn(t *testing.T) {
	st := state(t)
	hooks := []specs.Hook{{Path: script(t, "exit 1")}, {Path: script(t, "echo 2 >> ran")}, {Path: "/no/such/hook"}}
	err := RunAll(t.Context(), "poststop", hooks, st)
	if err == nil || !strings.Contains(err.Error(), "poststop hook #0: exit status 1") ||
		!strings.Contains(err.Error(), "poststop hook #2: fork/exec /no/such/hook: no such file or directory") {
		t.Errorf("RunAll() = %v; want the first and the last failure", err)
	}
	if b, err := os.ReadFile(filepath.Join(st.Bundle, "ran")); string(b) != "2\n" {
		t.Errorf("ran %q, error %v; want the second", b, err)
	}
	if err := RunAll(t.Context(), "poststop", hooks[1:2], st); err != nil {
		t.Errorf("RunAll() = %v; want nil", err)
	}
}

func TestOutputIsBounded(t *testing.T) {
	err := Run(t.Context(), "prestart", []specs.Hook{{Path: script(t, "head -c 1000000 /dev/zero | tr '\\0' x >&2; echo end >&2; exit 1")}}, state(t))
	if err == nil {
		t.Fatal("Run() = nil; want an error")
	}
	if got := err.Error(); len(got) > maxOutput+500 || !strings.Contains(got, "stderr: …x") || !strings.Contains(got, "xend\n") {
		t.Errorf("error of %d bytes: %.80s…; want the end of the output, at most %d bytes", len(got), got, maxOutput)
	}
}

func TestStateLargerThanAPipe(t *testing.T) {
	st := state(t)
	st.Annotations["big"] = strings.Repeat("x", 1<<20)
	if err := Run(t.Context(), "prestart", []specs.Hook{{Path: script(t, "exit 0")}}, st); err != nil {
		t.Errorf("Run() of a hook that does not read = %v; want nil", err)
	}
	if err := Run(t.Context(), "prestart", []specs.Hook{{Path: script(t, "test $(wc -c) -gt 1000000")}}, st); err != nil {
		t.Errorf("Run() of a hook that reads = %v; want nil", err)
	}
}

// TestTimeoutKillsGroup lets the hook's child hold the output open: it has to
// be gone too. The child holds the write end of a FIFO, whose end tells.
func TestTimeoutKillsGroup(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if out, err := exec.Command("mkfifo", fifo).CombinedOutput(); err != nil {
		t.Fatalf("mkfifo: %v: %s", err, out)
	}
	hook := script(t, fmt.Sprintf("sleep 1000 3> %s & sleep 1000", fifo))
	ended := make(chan error, 1)
	go func() {
		_, err := os.ReadFile(fifo) // Opens once the child has, ends with it.
		ended <- err
	}()
	start := time.Now()
	err := Run(t.Context(), "poststart", []specs.Hook{{Path: hook, Timeout: timeout(1)}}, state(t))
	if want := "hook ran past specified timeout of 1.0s"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Run() = %v; want %s", err, want)
	}
	if d := time.Since(start); d > 30*time.Second {
		t.Errorf("Run() took %s; want about 1s", d)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(30 * time.Second):
		t.Error("the hook's child outlived the timeout")
	}
}

func TestContextEndsHook(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	st := state(t)
	fifo := filepath.Join(st.Bundle, "fifo")
	if out, err := exec.Command("mkfifo", fifo).CombinedOutput(); err != nil {
		t.Fatalf("mkfifo: %v: %s", err, out)
	}
	cause := errors.New("pod is going away")
	go func() {
		_, _ = os.ReadFile(fifo) // Returns once the hook runs.
		cancel(cause)
	}()
	err := Run(ctx, "poststart", []specs.Hook{{Path: script(t, "echo > fifo; sleep 1000")}}, st)
	if !errors.Is(err, cause) {
		t.Errorf("Run() = %v; want %v", err, cause)
	}
}

// TestHookLeavesDaemon runs a hook that succeeds and leaves a process with
// its output open.
func TestHookLeavesDaemon(t *testing.T) {
	st := state(t)
	if err := Run(t.Context(), "createRuntime", []specs.Hook{{Path: script(t, "sleep 1000 & echo $! > pid")}}, st); err != nil {
		t.Errorf("Run() = %v; want nil", err)
	}
	b, err := os.ReadFile(filepath.Join(st.Bundle, "pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Errorf("the daemon is gone: kill: %v", err)
	}
}
