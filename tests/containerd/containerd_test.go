// Package containerd runs containers through a real containerd, with ctr and
// nerdctl, as users do. What a user sees must be what runc shows.
package containerd

import (
	"context"
	"os"
	"strings"
	"testing"

	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
	"github.com/vmrt/vmrt/tests/platform"
)

const runtimeName = "io.containerd.vmrt.v2"

// start runs a containerd of this branch with the busybox image in it.
func start(t testing.TB, branch string, tools ...string) *env.Env {
	t.Helper()
	return startWith(t, env.Config{Containerd: branch, Tools: tools})
}

// startWith is start with any configuration.
func startWith(t testing.TB, cfg env.Config) *env.Env {
	t.Helper()
	env.NeedProgram(t, "busybox")
	if _, err := platform.QEMU(); err != nil {
		env.SkipOrFail(t, "%v", err)
	}
	cfg.BinDirs, cfg.VMRT = []string{env.NeedBuild(t)}, platform.Settings("")
	e := env.ForTest(t, cfg)
	img, err := image.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Import(env.Context(t), img); err != nil {
		t.Fatal(err)
	}
	return e
}

// ctrRun runs a container with ctr to its end.
func ctrRun(ctx context.Context, e *env.Env, id string, flags []string, args ...string) (string, error) {
	all := append([]string{"run", "--rm", "--runtime", runtimeName}, flags...)
	all = append(all, image.BusyboxName, id)
	return e.Ctr(ctx, append(all, args...)...).Run()
}

func TestCtr(t *testing.T) {
	for _, branch := range []string{"2.4", "2.3"} {
		t.Run(branch, func(t *testing.T) { testCtr(t, branch) })
	}
}

func testCtr(t *testing.T, branch string) {
	e := start(t, branch)
	ctx := env.Context(t)

	out, err := ctrRun(ctx, e, "hello", nil, "uname", "-r")
	if err != nil {
		t.Fatal(err)
	}
	host, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	if out == "" || out == string(host) {
		t.Errorf("uname -r = %q; want another kernel than the host's %q", out, host)
	}

	_, err = ctrRun(ctx, e, "code", nil, "sh", "-c", "exit 42")
	if got := env.ExitCode(err); got != 42 {
		t.Errorf("exit code = %d (%v); want 42", got, err)
	}

	_, err = ctrRun(ctx, e, "missing", nil, "no-such-program")
	if err == nil || !strings.Contains(err.Error(), "executable file not found in $PATH") {
		t.Errorf("run of a missing program = %v; want runc's words", err)
	}
	testCtrDetached(ctx, t, e)
	testCtrTerminal(ctx, t, e)
}

// testCtrTerminal is `ctr run -t`, and a task to which ctr attaches later.
func testCtrTerminal(ctx context.Context, t *testing.T, e *env.Env) {
	t.Helper()
	cmd := e.Ctr(ctx, "run", "--rm", "-t", "--runtime", runtimeName, busybox, "tty", "sh")
	term, err := cmd.StartTerminal(33, 99)
	if err != nil {
		t.Fatal(err)
	}
	defer term.Close()
	at, err := term.Expect(0, "# ", terminalTimeout)
	if err != nil {
		t.Fatal(err)
	}
	term.Type("stty size; exit 8\n")
	if _, err := term.Expect(at, "33 99", terminalTimeout); err != nil {
		t.Error(err)
	}
	if got := env.ExitCode(cmd.Wait()); got != 8 {
		t.Errorf("exit code = %d; want 8", got)
	}
}

// testCtrDetached takes a container that runs in the background through ctr's
// task commands.
func testCtrDetached(ctx context.Context, t *testing.T, e *env.Env) {
	t.Helper()
	run := func(args ...string) string {
		t.Helper()
		out, err := e.Ctr(ctx, args...).Run()
		if err != nil {
			t.Errorf("ctr %s: %v", strings.Join(args, " "), err)
		}
		return out
	}
	run("run", "-d", "--runtime", runtimeName, image.BusyboxName, "web", "sleep", "1000")
	if got := run("task", "exec", "--exec-id", "e1", "web", "echo", "hi"); got != "hi\n" {
		t.Errorf("exec printed %q; want hi", got)
	}
	if got := run("task", "ls"); !strings.Contains(got, "RUNNING") {
		t.Errorf("task ls = %q; want RUNNING", got)
	}
	run("task", "pause", "web")
	if got := run("task", "ls"); !strings.Contains(got, "PAUSED") {
		t.Errorf("task ls = %q; want PAUSED", got)
	}
	run("task", "resume", "web")
	if got := run("task", "metrics", "web"); !strings.Contains(got, "memory") {
		t.Errorf("task metrics = %q; want memory", got)
	}
	if got := run("task", "ps", "web"); len(strings.Fields(got)) < 3 {
		t.Errorf("task ps = %q; want a pid", got)
	}
	_, err := e.Ctr(ctx, "container", "checkpoint", "--task", "web", "checkpoint:latest").Run()
	if err == nil || !strings.Contains(err.Error(), "not supported in a virtual machine") {
		t.Errorf("checkpoint = %v; want an error that it is not supported", err)
	}
	if got := run("task", "exec", "--exec-id", "e2", "web", "echo", "alive"); got != "alive\n" {
		t.Errorf("exec after a refused checkpoint printed %q; want alive", got)
	}
	run("task", "delete", "--force", "web")
	run("container", "delete", "web")
}
