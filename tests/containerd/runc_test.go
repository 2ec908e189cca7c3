package containerd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmrt/vmrt/tests/env"
)

const runcName = "io.containerd.runc.v2"

// outcome is what a user sees of a command.
type outcome struct {
	Stdout string
	Code   int
	// Phrase is the part of stderr that clients match; only compared when the
	// command fails.
	Phrase string
}

// scenario is a list of commands that must look the same under runc and vmrt.
type scenario struct {
	name string
	// steps are command lines of the client. In each argument DIR stands for a
	// folder with a few files. The first argument may be
	//
	//	RUN, CREATE  run or create with the runtime under test and the usual flags
	//	UNTIL OUT    the rest, again and again until its output is OUT
	//	SH           a line for the shell, in which RUN is as above
	steps [][]string
}

// client is a program that talks to containerd.
type client struct {
	name string
	// flags are those of run and create beside --runtime.
	flags []string
}

var (
	nerdctl = client{"nerdctl", []string{"--net", "none"}}
	ctr     = client{name: "ctr"}
)

// TestSameAsRunc shows the same commands to runc and to vmrt.
func TestSameAsRunc(t *testing.T) {
	e := start(t, "2.4", "runc", "nerdctl", "cni")
	for _, group := range []struct {
		name      string
		client    client
		scenarios []scenario
	}{
		{"nerdctl", nerdctl, nerdctlScenarios},
		{"nerdctl options", nerdctl, nerdctlOptions},
		{"nerdctl commands", nerdctl, nerdctlCommands},
		{"failed starts", nerdctl, failedStarts},
		{"ctr", ctr, ctrScenarios},
	} {
		t.Run(group.name, func(t *testing.T) { group.client.compare(t, e, group.scenarios) })
	}
}

func (c client) compare(t *testing.T, e *env.Env, scenarios []scenario) {
	for _, sc := range scenarios {
		t.Run(sc.name, func(t *testing.T) {
			ctx := env.Context(t)
			t.Cleanup(func() {
				if t.Failed() {
					removeAll(t, e)
				}
			})
			want := c.play(ctx, t, e, sc, runcName)
			if len(sc.steps) > 1 && want[0].Code != 0 {
				t.Fatal("the scenario does not work with runc")
			}
			got := c.play(ctx, t, e, sc, runtimeName)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("runc (-) and vmrt (+) differ:\n%s", diff)
			}
		})
	}
}

// files are what DIR holds.
var files = map[string]string{
	"in":         "from the host\n",
	"env":        "FROM_FILE=yes\n",
	"tree/a/f":   "f\n",
	"tree/a/run": "#!/bin/sh\n",
	"seccomp.json": `{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
		{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}`,
}

func (c client) play(ctx context.Context, t *testing.T, e *env.Env, sc scenario, runtime string) []outcome {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var all []outcome
	for _, step := range sc.steps {
		all = append(all, c.step(ctx, t, e, step, runtime, dir))
	}
	if out, err := os.ReadFile(filepath.Join(dir, "out")); err == nil {
		all = append(all, outcome{Stdout: string(out)})
	}
	return append(all, outcome{Stdout: fmt.Sprintf("clients left FIFOs of %d processes", removeFIFOs(t, e))})
}

// removeAll removes what a scenario that has failed may have left, so that the
// next does not fail for it.
func removeAll(t *testing.T, e *env.Env) {
	ctx, cancel := context.WithTimeout(context.Background(), stepTimeout)
	defer cancel()
	if out, err := e.Command(ctx, "sh", "-c", "nerdctl ps -aq --no-trunc | xargs -r nerdctl rm -f").Run(); err != nil {
		t.Errorf("remove what is left: %v: %s", err, out)
	}
}

// removeFIFOs removes the folders of FIFOs that clients have left, as they do
// for processes that they do not wait for, and returns their number.
func removeFIFOs(t *testing.T, e *env.Env) int {
	t.Helper()
	left, err := filepath.Glob(e.Path("/run/containerd/fifo/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range left {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	}
	return len(left)
}

// stepTimeout is for one command on a busy machine, untilTimeout for what
// happens by itself.
const (
	stepTimeout  = time.Minute
	untilTimeout = 90 * time.Second
)

func (c client) step(ctx context.Context, t *testing.T, e *env.Env, step []string, runtime, dir string) outcome {
	t.Helper()
	args := slices.Clone(step)
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "DIR", dir)
	}
	with := append([]string{"--runtime", runtime}, c.flags...)
	name := c.name
	switch args[0] {
	case "RUN":
		args = append(append([]string{"run"}, with...), args[1:]...)
	case "CREATE":
		args = append(append([]string{"create"}, with...), args[1:]...)
	case "SH":
		name = "sh"
		args = []string{"-c", strings.ReplaceAll(strings.ReplaceAll(args[1], "$RUNTIME", runtime), "RUN", "run "+strings.Join(with, " "))}
	case "UNTIL":
		return c.until(ctx, t, e, args[1], args[2:], runtime, dir)
	}
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := e.Command(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Cmd.Run()
	var exit *exec.ExitError
	if ctx.Err() != nil || err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s %v: %v", name, args, err)
	}
	for _, usage := range []string{"Incorrect Usage", "unknown flag", "unknown shorthand flag", "unknown command"} {
		if strings.Contains(stderr.String(), usage) {
			t.Fatalf("%s %v: %s", name, args, stderr.String())
		}
	}
	if strings.Contains(stderr.String(), "init binary") {
		env.SkipOrFail(t, "needs Debian's tini: %s", stderr.String())
	}
	out := strings.ReplaceAll(stdout.String(), dir, "DIR")
	o := outcome{Stdout: random.ReplaceAllString(out, "ID"), Code: env.ExitCode(err)}
	if err != nil {
		for _, p := range phrases {
			if strings.Contains(stderr.String(), p) {
				o.Phrase = p
			}
		}
	}
	t.Logf("%s: %s %s: code %d, stdout %q, stderr %q", runtime, name, strings.Join(args, " "), o.Code, o.Stdout, stderr.String())
	return o
}

// until repeats a command: clients have no event for what it waits for.
func (c client) until(ctx context.Context, t *testing.T, e *env.Env, want string, step []string, runtime, dir string) outcome {
	t.Helper()
	deadline := time.Now().Add(untilTimeout)
	for {
		o := c.step(ctx, t, e, step, runtime, dir)
		if o.Code == 0 && o.Stdout == want || time.Now().After(deadline) {
			return o
		}
		select {
		case <-ctx.Done():
			t.Fatal(ctx.Err())
		case <-time.After(300 * time.Millisecond):
		}
	}
}

// random are the parts of an output that differ from run to run.
var random = regexp.MustCompile(`[0-9a-f]{64}`)

// phrases are what clients look for in errors. The last that is found counts.
var phrases = []string{
	"not found", "executable file not found in $PATH", "permission denied", "is a directory", "not a directory",
	"no such file or directory", "unable to find user",
	"no users found", "Read-only file system", "is already used by", "no such container", "already exists",
	"not running", "is not in a separate kernel namespace", "cannot exec in a paused state", "Operation not supported",
	"can't fork: Resource temporarily unavailable",
}
