package containerd

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
)

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
	// steps are nerdctl command lines; RUN stands for `run` with the runtime
	// under test and its usual flags.
	steps [][]string
}

var scenarios = []scenario{
	{"output", [][]string{{"RUN", "--rm", image.BusyboxName, "sh", "-c", "echo out; echo err >&2"}}},
	{"exit code", [][]string{{"RUN", "--rm", image.BusyboxName, "sh", "-c", "exit 42"}}},
	{"missing program", [][]string{{"RUN", "--rm", image.BusyboxName, "no-such-program"}}},
	{"user and groups", [][]string{{"RUN", "--rm", "--user", "1002:1002", "--group-add", "50000", image.BusyboxName, "id"}}},
	{"bad user", [][]string{{"RUN", "--rm", "--user", "nobody-here", image.BusyboxName, "id"}}},
	{"workdir", [][]string{{"RUN", "--rm", "--workdir", "/tmp/new", image.BusyboxName, "pwd"}}},
	{"env and hostname", [][]string{{"RUN", "--rm", "--hostname", "box", "-e", "A=b c", image.BusyboxName, "sh", "-c", "echo $A; hostname"}}},
	{"capabilities", [][]string{{"RUN", "--rm", "--cap-drop", "ALL", "--cap-add", "NET_RAW", image.BusyboxName, "grep", "Cap", "/proc/self/status"}}},
	{"default capabilities", [][]string{{"RUN", "--rm", image.BusyboxName, "grep", "Cap[IPEB]", "/proc/self/status"}}},
	{"no new privileges", [][]string{{"RUN", "--rm", "--security-opt", "no-new-privileges", image.BusyboxName, "grep", "NoNewPrivs", "/proc/self/status"}}},
	{"seccomp", [][]string{{"RUN", "--rm", image.BusyboxName, "grep", "Seccomp:", "/proc/self/status"}}},
	{"seccomp unconfined", [][]string{{"RUN", "--rm", "--security-opt", "seccomp=unconfined", image.BusyboxName, "grep", "Seccomp:", "/proc/self/status"}}},
	{"read-only root", [][]string{{"RUN", "--rm", "--read-only", image.BusyboxName, "touch", "/file"}}},
	{"tmpfs", [][]string{{"RUN", "--rm", "--tmpfs", "/t:size=1m,mode=1770", image.BusyboxName, "sh", "-c", "stat -c %a /t; df -k /t | tail -1 | awk '{print $2}'"}}},
	{"shm size", [][]string{{"RUN", "--rm", "--shm-size", "8m", image.BusyboxName, "sh", "-c", "df -k /dev/shm | tail -1 | awk '{print $2}'"}}},
	{"ulimit", [][]string{{"RUN", "--rm", "--ulimit", "nofile=123:456", image.BusyboxName, "sh", "-c", "ulimit -n; ulimit -Hn"}}},
	{"sysctl", [][]string{{"RUN", "--rm", "--sysctl", "kernel.shmmax=12345", image.BusyboxName, "cat", "/proc/sys/kernel/shmmax"}}},
	{"masked path", [][]string{{"RUN", "--rm", image.BusyboxName, "sh", "-c", "wc -c < /proc/keys; echo x > /proc/sysrq-trigger"}}},
	{"pids", [][]string{{"RUN", "--rm", image.BusyboxName, "sh", "-c", "echo $$"}}},
	{"exec", [][]string{
		{"RUN", "-d", "--name", "box", image.BusyboxName, "sleep", "1000"},
		{"exec", "box", "echo", "hi"},
		{"exec", "box", "sh", "-c", "exit 7"},
		{"exec", "box", "no-such-program"},
		{"exec", "box", "/etc/passwd"},
		{"exec", "--workdir", "/nowhere", "box", "pwd"},
		{"exec", "--user", "1002", "box", "id", "-u"},
		{"exec", "box", "echo", "alive"},
		{"rm", "-f", "box"},
	}},
	{"stop", [][]string{
		{"RUN", "-d", "--name", "box", image.BusyboxName, "sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done"},
		{"stop", "box"},
		{"inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "box"},
		{"rm", "box"},
	}},
	{"kill", [][]string{
		{"RUN", "-d", "--name", "box", image.BusyboxName, "sleep", "1000"},
		{"kill", "-s", "KILL", "box"},
		{"wait", "box"},
		{"inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "box"},
		{"rm", "box"},
	}},
	{"pause", [][]string{
		{"RUN", "-d", "--name", "box", image.BusyboxName, "sleep", "1000"},
		{"pause", "box"},
		{"inspect", "-f", "{{.State.Status}}", "box"},
		{"unpause", "box"},
		{"inspect", "-f", "{{.State.Status}}", "box"},
		{"rm", "-f", "box"},
	}},
	{"restart", [][]string{
		{"RUN", "-d", "--name", "box", image.BusyboxName, "sh", "-c", "echo run >> /runs; wc -l < /runs; exec sleep 1000"},
		{"restart", "-t", "0", "box"},
		{"exec", "box", "wc", "-l", "/runs"},
		{"rm", "-f", "box"},
	}},
	{"commit", [][]string{
		{"RUN", "-d", "--name", "box", image.BusyboxName, "sh", "-c", "echo made > /made; sleep 1000"},
		{"exec", "box", "sh", "-c", "until [ -e /made ]; do sleep 0.1; done"},
		{"commit", "box", "committed:latest"},
		{"rm", "-f", "box"},
		{"RUN", "--rm", "committed:latest", "cat", "/made"},
		{"rmi", "-f", "committed:latest"},
	}},
	{"cp", [][]string{
		{"RUN", "-d", "--name", "box", image.BusyboxName, "sleep", "1000"},
		{"cp", "DIR/in", "box:/tmp/in"},
		{"exec", "box", "cat", "/tmp/in"},
		{"exec", "box", "sh", "-c", "echo from the container > /tmp/out"},
		{"cp", "box:/tmp/out", "DIR/out"},
		{"rm", "-f", "box"},
	}},
	{"logs", [][]string{
		{"RUN", "-d", "--name", "box", image.BusyboxName, "sh", "-c", "echo one; echo two; exit 5"},
		{"wait", "box"},
		{"logs", "box"},
		{"rm", "box"},
	}},
}

// random are the parts of an output that differ from run to run.
var random = regexp.MustCompile(`[0-9a-f]{64}`)

// phrases are what clients look for in errors.
var phrases = []string{
	"executable file not found in $PATH", "permission denied", "no such file or directory", "unable to find user",
	"no users found", "Read-only file system",
}

// TestSameAsRunc shows the same commands to runc and to vmrt.
func TestSameAsRunc(t *testing.T) {
	e := start(t, "2.4", "runc", "nerdctl", "cni")
	for _, sc := range scenarios {
		t.Run(sc.name, func(t *testing.T) {
			ctx := env.Context(t)
			want := sc.play(ctx, t, e, "io.containerd.runc.v2")
			if len(sc.steps) > 1 && want[0].Code != 0 {
				t.Fatal("the scenario does not work with runc")
			}
			got := sc.play(ctx, t, e, runtimeName)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("runc (-) and vmrt (+) differ:\n%s", diff)
			}
		})
	}
}

func (sc scenario) play(ctx context.Context, t *testing.T, e *env.Env, runtime string) []outcome {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "in"), []byte("from the host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	var all []outcome
	for _, step := range sc.steps {
		args := slices.Clone(step)
		for i := range args {
			args[i] = strings.Replace(args[i], "DIR", dir, 1)
		}
		if step[0] == "RUN" {
			args = append([]string{"run", "--runtime", runtime, "--net", "none"}, args[1:]...)
		}
		var stdout, stderr bytes.Buffer
		cmd := e.Nerdctl(ctx, args...)
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		err := cmd.Cmd.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatalf("nerdctl %v: %v", args, err)
		}
		o := outcome{Stdout: random.ReplaceAllString(stdout.String(), "ID"), Code: env.ExitCode(err)}
		if err != nil {
			for _, p := range phrases {
				if strings.Contains(stderr.String(), p) {
					o.Phrase = p
				}
			}
		}
		t.Logf("%s: nerdctl %s: code %d, stdout %q, stderr %q", runtime, strings.Join(args, " "), o.Code, o.Stdout, stderr.String())
		all = append(all, o)
	}
	if out, err := os.ReadFile(filepath.Join(dir, "out")); err == nil {
		all = append(all, outcome{Stdout: string(out)})
	}
	return all
}
