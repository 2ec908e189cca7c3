// Package cri runs pods as Kubernetes does, through containerd's CRI plugin, in
// both of its sandbox modes.
package cri

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
)

// patience bounds the wait for what must happen soon.
const patience = 60 * time.Second

// inModes runs a test in an environment of its own for each sandbox mode.
func inModes(t *testing.T, f func(t *testing.T, e *env.Env)) {
	for _, mode := range env.Modes {
		t.Run(mode, func(t *testing.T) { f(t, start(t, mode)) })
	}
}

func start(t *testing.T, mode string) *env.Env {
	t.Helper()
	return startCRI(t, env.CRI{Sandboxer: mode})
}

// startCRI starts an environment with vmrt as the runtime of all pods.
func startCRI(t testing.TB, cri env.CRI) *env.Env {
	t.Helper()
	return startWith(t, cri, "")
}

// startWith is startCRI with a configuration of the runtime.
func startWith(t testing.TB, cri env.CRI, config string) *env.Env {
	t.Helper()
	return startConfig(t, env.Config{CRI: &cri, VMRT: config})
}

// startConfig is startCRI with any configuration that has CRI.
func startConfig(t testing.TB, cfg env.Config) *env.Env {
	t.Helper()
	env.NeedRoot(t)
	env.NeedProgram(t, "qemu-system-x86_64", "busybox")
	bin := env.NeedBuild(t)
	busybox, err := image.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	cri := *cfg.CRI
	cri.Runtime, cri.Images = "vmrt", append(slices.Clone(cri.Images), busybox)
	cfg.BinDirs, cfg.CRI = []string{bin}, &cri
	return env.ForTest(t, cfg)
}

// pod is a pod of a test, removed at its end.
type pod struct {
	*env.Pod
	t   *testing.T
	e   *env.Env
	ctx context.Context
}

func runPod(t *testing.T, e *env.Env, name string, config env.Object) *pod {
	t.Helper()
	p := &pod{t: t, e: e, ctx: env.Context(t)}
	var err error
	if p.Pod, err = e.RunPod(p.ctx, name, config); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// The test's own context has ended by now.
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := p.Remove(ctx); err != nil {
			t.Error(err)
		}
	})
	return p
}

// run starts a container that runs a shell script.
func (p *pod) run(name, script string) (id string) {
	p.t.Helper()
	return p.runImage(name, image.BusyboxName, script)
}

func (p *pod) runImage(name, image, script string) (id string) {
	p.t.Helper()
	id, err := p.Pod.Run(p.ctx, name, image, env.Object{"command": []string{"sh", "-c", script}})
	if err != nil {
		p.t.Fatal(err)
	}
	return id
}

// crictl runs a command that must work and returns what it prints.
func (p *pod) crictl(args ...string) string {
	p.t.Helper()
	out, err := p.e.Crictl(p.ctx, args...).Run()
	if err != nil {
		p.t.Errorf("crictl %s: %v", strings.Join(args, " "), err)
	}
	return strings.TrimSpace(out)
}

// sh runs a script in a container.
func (p *pod) sh(id, script string) string {
	p.t.Helper()
	return p.crictl("exec", "-s", id, "sh", "-c", script)
}

// container is part of what `crictl inspect` prints.
type container struct {
	Status struct {
		State    string
		ExitCode int
		Reason   string
	}
}

func (p *pod) inspect(id string) (c container) {
	p.t.Helper()
	if err := json.Unmarshal([]byte(p.crictl("inspect", id)), &c); err != nil {
		p.t.Fatalf("crictl inspect %s: %v", id, err)
	}
	return c
}

// awaitExit waits until the container has exited.
func (p *pod) awaitExit(id string) container {
	p.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		c := p.inspect(id)
		if c.Status.State == "CONTAINER_EXITED" {
			return c
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("container %s is %s; want it exited", id, c.Status.State)
		}
	}
}

// podState is part of what `crictl inspectp` prints.
func (p *pod) state() (state string, pid int) {
	p.t.Helper()
	var s struct {
		Status struct{ State string }
		Info   struct{ Pid int }
	}
	if err := json.Unmarshal([]byte(p.crictl("inspectp", p.ID)), &s); err != nil {
		p.t.Fatalf("crictl inspectp: %v", err)
	}
	return s.Status.State, s.Info.Pid
}

func (p *pod) awaitState(want string) {
	p.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		got, _ := p.state()
		if got == want {
			return
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("pod is %s; want %s", got, want)
		}
	}
}
