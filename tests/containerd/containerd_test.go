// Package containerd runs containers through a real containerd, with ctr and
// nerdctl, as users do. What a user sees must be what runc shows.
package containerd

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
	"github.com/vmrt/vmrt/tests/platform"
)

const runtimeName = "io.containerd.vmrt.v2"

// binDir is where `make build` puts the binaries.
func binDir(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("VMRT_BIN")
	if dir == "" {
		dir = "../../bin"
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "guest")); err != nil {
		env.SkipOrFail(t, "needs `make build`: %v", err)
	}
	return dir
}

// start runs a containerd of this branch with the busybox image in it.
func start(t testing.TB, branch string, tools ...string) *env.Env {
	t.Helper()
	env.NeedProgram(t, "busybox")
	if _, err := platform.QEMU(); err != nil {
		env.SkipOrFail(t, "%v", err)
	}
	e := env.ForTest(t, env.Config{Containerd: branch, BinDirs: []string{binDir(t)}, Tools: tools, VMRT: platform.Settings("")})
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
	run("task", "delete", "--force", "web")
	run("container", "delete", "web")
}
