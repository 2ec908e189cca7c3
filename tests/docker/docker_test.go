// Package docker runs containers with Docker, as its users do: a dockerd on a
// containerd. What they see must be what runc shows.
package docker

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
	"github.com/vmrt/vmrt/tests/platform"
)

const (
	runtimeName = "io.containerd.vmrt.v2"
	busybox     = "busybox"
	// patience bounds the wait for what happens by itself, on a busy machine.
	patience = 90 * time.Second
)

// docker is a dockerd with the busybox image.
type docker struct {
	*testing.T
	env *env.Env
	ctx context.Context
}

// start starts a dockerd of this version.
func start(t *testing.T, version string) docker {
	t.Helper()
	env.NeedRoot(t)
	env.NeedProgram(t, "busybox", "iptables")
	if _, err := platform.QEMU(); err != nil {
		env.SkipOrFail(t, "%v", err)
	}
	bin := env.NeedBuild(t)
	e := env.ForTest(t, env.Config{
		BinDirs: []string{bin}, Tools: []string{"runc"}, Docker: version,
		// Of the networks that a container is connected to.
		VMRT: platform.Settings("late_interfaces = 2"),
	})
	img, err := image.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	d := docker{T: t, env: e, ctx: env.Context(t)}
	if got := d.docker("version", "-f", "{{.Server.Version}}"); !strings.HasPrefix(got, version+".") {
		t.Fatalf("dockerd is of version %s; want %s", got, version)
	}
	if err := e.DockerLoad(d.ctx, img); err != nil {
		t.Fatal(err)
	}
	return d
}

// sub runs a subtest.
func (d docker) sub(name string, f func(d docker)) {
	d.Run(name, func(t *testing.T) { f(docker{T: t, env: d.env, ctx: env.Context(t)}) })
}

// docker runs a command that must work and returns what it prints.
func (d docker) docker(args ...string) string {
	d.Helper()
	out, err := d.env.Docker(d.ctx, args...).Run()
	if err != nil {
		d.Fatalf("docker %s: %v", strings.Join(args, " "), err)
	}
	return strings.TrimSpace(out)
}

// run is `docker run` in a virtual machine.
func (d docker) run(args ...string) string {
	d.Helper()
	return d.docker(append([]string{"run", "--runtime", runtimeName}, args...)...)
}

// fails runs a command that must fail, with these words.
func (d docker) fails(code int, words string, args ...string) {
	d.Helper()
	out, err := d.env.Docker(d.ctx, args...).Run()
	// What an exec's runtime says is part of the exec's output.
	if got := env.ExitCode(err); got != code || !strings.Contains(out+err.Error(), words) {
		d.Errorf("docker %s = %q, %v; want exit code %d and %q", strings.Join(args, " "), out, err, code, words)
	}
}

// keep has the containers removed at the end of the test.
func (d docker) keep(names ...string) { d.after(append([]string{"rm", "-f"}, names...)...) }

// after runs a command at the end of the test.
func (d docker) after(args ...string) {
	d.Cleanup(func() {
		// The test's own context has ended by now.
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if _, err := d.env.Docker(ctx, args...).Run(); err != nil {
			d.Error(err)
		}
	})
}

// until repeats a command until it prints want: Docker's clients have no event
// for what it waits for.
func (d docker) until(want string, args ...string) {
	d.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(200 * time.Millisecond) {
		out, err := d.env.Docker(d.ctx, args...).Run()
		if err == nil && strings.TrimSpace(out) == want {
			return
		}
		if time.Now().After(deadline) {
			d.Fatalf("docker %s = %q, %v; want %q", strings.Join(args, " "), out, err, want)
		}
	}
}

// kill kills the process of a container's that has these words in its command
// line: its virtual machine's monitor, say.
func (d docker) kill(container, program string) {
	d.Helper()
	id := d.docker("inspect", "-f", "{{.Id}}", container)
	const script = `for d in /proc/[0-9]*; do
		tr '\0' ' ' <$d/cmdline 2>/dev/null | grep -q "$1.*$2" && [ ${d#/proc/} != $$ ] && exec kill -KILL ${d#/proc/}
	done; exit 1`
	if _, err := d.env.Command(d.ctx, "bash", "-c", script, "kill", program, id).Run(); err != nil {
		d.Fatalf("kill %s of container %s: %v", program, container, err)
	}
}
