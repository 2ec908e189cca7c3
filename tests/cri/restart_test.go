package cri

import (
	"context"
	"errors"
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
		ends, end := p.runUntil("ends", 5)

		lost := runPod(t, e, "lost", nil)
		cut := lost.run("cut", "sleep 1000")

		// An exec is under way, and the ends of a container and of a virtual
		// machine come while nobody looks.
		exec := e.Crictl(ctx, "exec", "-s", stays, "sleep", "1000")
		if err := exec.Start(); err != nil {
			t.Fatal(err)
		}
		vm := findVM(t, lost.ID)
		restartAfter(t, e, func() error {
			return errors.Join(syscall.Kill(vm, syscall.SIGKILL), end(), awaitGone(fmt.Sprintf("/proc/%d", vm)))
		})
		if err := exec.Wait(); err == nil {
			t.Error("crictl exec lives through the end of its server")
		}
		if c := p.awaitExit(ends); c.Status.ExitCode != 5 {
			t.Errorf("exit code = %d; want 5", c.Status.ExitCode)
		}
		lost.awaitState("SANDBOX_NOTREADY")
		if c := lost.awaitExit(cut); c.Status.ExitCode != 137 {
			t.Errorf("exit code of a container whose virtual machine was killed = %d; want 137", c.Status.ExitCode)
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

// runUntil runs a container that exits with status once end is called, which
// returns when it has, and does not need containerd.
func (p *pod) runUntil(name string, status int) (id string, end func() error) {
	p.t.Helper()
	host := p.t.TempDir()
	id, err := p.Pod.Run(p.ctx, name, image.BusyboxName, env.Object{
		"command": []string{"sh", "-c", fmt.Sprintf("while [ ! -e /host/go ]; do sleep 0.1; done; exit %d", status)},
		"mounts":  []env.Object{{"container_path": "/host", "host_path": host}},
	})
	if err != nil {
		p.t.Fatal(err)
	}
	proc := p.e.Path(fmt.Sprintf("/proc/%d", p.pid(id)))
	return id, func() error {
		return errors.Join(os.WriteFile(filepath.Join(host, "go"), nil, 0o644), awaitGone(proc))
	}
}

// pid returns the process that stands for a container, in the environment.
func (p *pod) pid(id string) int {
	p.t.Helper()
	var c struct{ Info struct{ Pid int } }
	p.decode(&c, "inspect", id)
	if c.Info.Pid == 0 {
		p.t.Fatalf("container %s has no pid", id)
	}
	return c.Info.Pid
}

// awaitGone waits for the end of a process, by its folder in /proc.
func awaitGone(proc string) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		b, err := os.ReadFile(filepath.Join(proc, "cmdline"))
		if err != nil || len(b) == 0 { // a zombie has none
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s still runs", proc)
		}
	}
}

// restart restarts containerd and returns once its CRI plugin answers.
func restart(t *testing.T, e *env.Env) {
	t.Helper()
	restartAfter(t, e, func() error { return nil })
}

// restartAfter is restart, with meanwhile called while there is no containerd.
func restartAfter(t *testing.T, e *env.Env, meanwhile func() error) {
	t.Helper()
	ctx := env.Context(t)
	if err := e.WithoutContainerd(ctx, meanwhile); err != nil {
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
		const bundles = "/state/io.containerd.runtime.v2.task/k8s.io/*"
		before := glob(t, e.Dir+bundles)
		interrupted := make(chan string, 1)
		go func() {
			id, err := p.Create(ctx, "interrupted", image.BusyboxName, nil)
			if err == nil {
				_, err = e.Crictl(ctx, "start", id).Run() // which asks the shim to create it
			}
			interrupted <- id
			done <- err
		}()
		for ; len(glob(t, e.Dir+bundles)) <= len(before); time.Sleep(time.Millisecond) {
			if ctx.Err() != nil {
				t.Fatal("no container is being created")
			}
		}
		restart(t, e)
		id := <-interrupted
		t.Logf("interrupted container: %v", <-done)
		if got := p.inspect(id).Status.State; got == "CONTAINER_UNKNOWN" {
			t.Errorf("container whose start was interrupted is %s", got)
		}
		p.crictl("rm", "--force", id)
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
	for ctx := env.Context(t); len(glob(t, e.Path("/run/vmrt/k8s.io/*"))) == 0; time.Sleep(time.Millisecond) {
		if ctx.Err() != nil {
			t.Fatal("no pod is being created")
		}
	}
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	found, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	return found
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
