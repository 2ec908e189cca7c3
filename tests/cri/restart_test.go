package cri

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
)

// Whatever containerd misses while it is away is known once it is back.
func TestContainerdRestarts(t *testing.T) {
	inModes(t, func(t *testing.T, e *env.Env) {
		ctx := env.Context(t)
		p := runPod(t, e, "pod", nil)
		stays := p.run("stays", "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.2; done")
		host := t.TempDir()
		ends, err := p.Run(ctx, "ends", image.BusyboxName, env.Object{
			"command": []string{"sh", "-c", "while [ ! -e /host/go ]; do sleep 0.1; done; exit 5"},
			"mounts":  []env.Object{{"container_path": "/host", "host_path": host}},
		})
		if err != nil {
			t.Fatal(err)
		}

		// An exec is under way, and the end of a container comes while nobody
		// looks.
		exec := e.Crictl(ctx, "exec", "-s", stays, "sleep", "1000")
		if err := exec.Start(); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(host, "go"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		restart(t, e)
		if err := exec.Wait(); err == nil {
			t.Error("crictl exec lives through the end of its server")
		}
		if c := p.awaitExit(ends); c.Status.ExitCode != 5 {
			t.Errorf("exit code = %d; want 5", c.Status.ExitCode)
		}
		if got, _ := p.state(); got != "SANDBOX_READY" {
			t.Errorf("pod is %s; want it ready", got)
		}
		if got := p.inspect(stays).Status.State; got != "CONTAINER_RUNNING" {
			t.Errorf("container is %s; want it running", got)
		}
		if got := p.sh(stays, "echo alive"); got != "alive" {
			t.Errorf("exec = %q; want alive", got)
		}
		if again := p.run("again", "sleep 1000"); p.sh(again, "echo new") != "new" {
			t.Error("a new container does not answer")
		}
		checkLines(t, filepath.Join(p.LogDir, "stays.log"), 0)
	})
}

// restart restarts containerd and returns once its CRI plugin answers.
func restart(t *testing.T, e *env.Env) {
	t.Helper()
	ctx := env.Context(t)
	if err := e.RestartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		_, err := e.Crictl(ctx, "pods").Run()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// checkLines wants the lines of a counting container's log in order and without
// more than so many gaps.
func checkLines(t *testing.T, path string, gaps int) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	next := 1
	for line := range strings.Lines(string(b)) {
		_, text, ok := strings.Cut(strings.TrimSpace(line), " stdout F ")
		var n int
		if _, err := fmt.Sscanf(text, "line %d", &n); !ok || err != nil || n < next || n > next && gaps == 0 {
			t.Fatalf("log has %q; want line %d", line, next)
		}
		if n > next {
			t.Logf("log lacks lines %d to %d", next, n-1)
			gaps--
		}
		next = n + 1
	}
	if next < 10 {
		t.Errorf("log has %d lines; want more", next-1)
	}
}

// A restart during the creation of a pod or a container leaves nothing that
// cannot be removed.
func TestRestartDuringCreate(t *testing.T) {
	inModes(t, func(t *testing.T, e *env.Env) {
		ctx := env.Context(t)
		done := make(chan error, 1)
		go func() {
			_, err := e.RunPod(ctx, "interrupted", nil)
			done <- err
		}()
		awaitShim(t, e)
		restart(t, e)
		t.Logf("interrupted RunPodSandbox: %v", <-done)
		defer removeAll(t, e)

		p := &pod{t: t, e: e, ctx: ctx}
		var err error
		if p.Pod, err = e.RunPod(ctx, "pod", nil); err != nil {
			t.Fatal(err)
		}
		go func() {
			_, err := p.Pod.Run(ctx, "interrupted", image.BusyboxName, nil)
			done <- err
		}()
		restart(t, e)
		t.Logf("interrupted container: %v", <-done)
		if got := p.sh(p.run("after", "sleep 1000"), "echo alive"); got != "alive" {
			t.Errorf("container created after the restart = %q; want alive", got)
		}
	})
}

// removeAll removes every pod that a test has left, known to it or not.
func removeAll(t *testing.T, e *env.Env) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	out, err := e.Crictl(ctx, "pods", "-q").Run()
	if err != nil {
		t.Error(err)
	}
	for _, id := range strings.Fields(out) {
		if _, err := e.Crictl(ctx, "rmp", "--force", id).Run(); err != nil {
			t.Error(err)
		}
	}
}

// awaitShim returns once a shim of this project runs in the environment.
func awaitShim(t *testing.T, e *env.Env) {
	t.Helper()
	for ctx := env.Context(t); ; {
		shims, err := filepath.Glob(e.Path("/run/vmrt/k8s.io/*"))
		if err != nil {
			t.Fatal(err)
		}
		if len(shims) > 0 {
			return
		}
		if ctx.Err() != nil {
			t.Fatal("no pod is being created")
		}
	}
}

// The end of a pod's virtual machine is seen at once, and the pod can be
// removed.
func TestVMDies(t *testing.T) {
	inModes(t, func(t *testing.T, e *env.Env) {
		p := runPod(t, e, "pod", nil)
		id := p.run("one", "sleep 1000")
		if err := syscall.Kill(findVM(t, p.ID), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		p.awaitState("SANDBOX_NOTREADY")
		if c := p.awaitExit(id); c.Status.ExitCode != 137 {
			t.Errorf("exit code = %d; want 137", c.Status.ExitCode)
		}
	})
}

// So is the end of the shim.
func TestShimDies(t *testing.T) {
	inModes(t, func(t *testing.T, e *env.Env) {
		p := runPod(t, e, "pod", nil)
		id := p.run("one", "sleep 1000")
		if err := syscall.Kill(parent(t, findVM(t, p.ID)), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		p.awaitExit(id)
		p.awaitState("SANDBOX_NOTREADY")
	})
}

// findVM returns the pid of a pod's VMM.
func findVM(t *testing.T, pod string) int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil || !strings.Contains(string(b), "qemu-system") || !strings.Contains(string(b), "vmrt-"+pod) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		if err != nil {
			t.Fatal(err)
		}
		return pid
	}
	t.Fatalf("pod %s has no VMM", pod)
	return 0
}

// parent returns the pid of a process's parent.
func parent(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	// proc(5): the name is in parentheses; then come state and parent.
	_, rest, _ := strings.Cut(string(b), ") ")
	ppid, err := strconv.Atoi(strings.Fields(rest)[1])
	if err != nil {
		t.Fatal(err)
	}
	return ppid
}
