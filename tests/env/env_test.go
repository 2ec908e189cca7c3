package env_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmrt/vmrt/hack/tools"
	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
)

func busybox(t *testing.T) image.Image {
	t.Helper()
	env.NeedProgram(t, "busybox")
	img, err := image.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func TestRunc(t *testing.T) {
	for _, branch := range []string{"2.3", "2.4"} {
		t.Run(branch, func(t *testing.T) {
			ctx := env.Context(t)
			e := env.ForTest(t, env.Config{Containerd: branch, Tools: []string{"runc"}})
			if err := e.Import(ctx, busybox(t)); err != nil {
				t.Fatal(err)
			}
			out, err := e.Ctr(ctx, "run", "--rm", image.BusyboxName, "one", "sh", "-c", "echo hello; exit 7").Run()
			if got := env.ExitCode(err); out != "hello\n" || got != 7 {
				t.Errorf("ctr run = %q, code %d (%v); want \"hello\\n\", code 7", out, got, err)
			}
			version, err := e.Ctr(ctx, "version").Run()
			if err != nil || strings.Count(version, "v"+branch+".") != 2 {
				t.Errorf("ctr version = %q, %v; want client and server v%s", version, err, branch)
			}
		})
	}
}

func TestLeftovers(t *testing.T) {
	ctx := env.Context(t)
	env.NeedRoot(t)
	e, err := env.Start(ctx, env.Config{Tools: []string{"runc"}, Progress: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := e.Stop(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(e.Dir); !os.IsNotExist(err) {
			t.Errorf("after Stop: stat %s = %v; want not exist", e.Dir, err)
		}
	}()
	if err := e.Import(ctx, busybox(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Ctr(ctx, "run", "-d", image.BusyboxName, "stays", "sleep", "1000").Run(); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Command(ctx, "sh", "-c", "mkdir -p /run/x && mount -t tmpfs x /run/x && ip link add d0 type veth peer name d1").Run(); err != nil {
		t.Fatal(err)
	}
	// Nothing goes away by waiting here.
	short, cancel := context.WithCancel(ctx)
	cancel()
	left, err := e.Leftovers(short)
	if err != nil {
		t.Fatal(err)
	}
	all := strings.Join(left, "\n")
	for _, want := range []string{
		"sleep 1000", "containerd-shim-runc-v2", " tmpfs /run/x", "interface d0", "/default/stays", "file /run/x",
	} {
		if !strings.Contains(all, want) {
			t.Errorf("leftovers lack %q:\n%s", want, all)
		}
	}
	t.Logf("leftovers:\n%s", all)
	if err := e.RestartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	out, err := e.Ctr(ctx, "task", "ls", "-q").Run()
	if err != nil || strings.TrimSpace(out) != "stays" {
		t.Errorf("tasks after a restart of containerd = %q, %v; want \"stays\"", out, err)
	}
}

func TestTerminal(t *testing.T) {
	ctx := env.Context(t)
	e := env.ForTest(t, env.Config{Tools: []string{"runc"}})
	if err := e.Import(ctx, busybox(t)); err != nil {
		t.Fatal(err)
	}
	cmd := e.Ctr(ctx, "run", "--rm", "-t", image.BusyboxName, "term", "sh")
	term, err := cmd.StartTerminal(33, 77)
	if err != nil {
		t.Fatal(err)
	}
	defer term.Close()
	at, err := term.Expect(0, "# ", 30*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct{ input, want string }{
		{"stty size\n", "33 77"},
		{"echo $((6*7))\n", "\n42"},
	} {
		if err := term.Type(step.input); err != nil {
			t.Fatal(err)
		}
		if at, err = term.Expect(at, step.want, 30*time.Second); err != nil {
			t.Fatal(err)
		}
	}
	if err := term.Type("exit 5\n"); err != nil {
		t.Fatal(err)
	}
	if got := env.ExitCode(cmd.Wait()); got != 5 {
		t.Errorf("exit code of ctr run -t = %d; want 5", got)
	}
}

func TestNerdctl(t *testing.T) {
	ctx := env.Context(t)
	env.NeedProgram(t, "iptables")
	e := env.ForTest(t, env.Config{Tools: []string{"runc", "nerdctl", "cni"}})
	if err := e.Import(ctx, busybox(t)); err != nil {
		t.Fatal(err)
	}
	out, err := e.Nerdctl(ctx, "run", "--rm", "busybox", "sh", "-c", "ip -4 addr show eth0; exit 3").Run()
	if got := env.ExitCode(err); got != 3 || !strings.Contains(out, "inet 10.4.0.") {
		t.Errorf("nerdctl run = %q, code %d (%v); want an address in 10.4.0.0/24 and code 3", out, got, err)
	}
}

func TestSignal(t *testing.T) {
	ctx := env.Context(t)
	e := env.ForTest(t, env.Config{})
	cmd := e.Command(ctx, "sh", "-c", "trap 'exit 9' TERM; echo up; while :; do read -r x; done")
	term, err := cmd.StartTerminal(24, 80)
	if err != nil {
		t.Fatal(err)
	}
	defer term.Close()
	if _, err := term.Expect(0, "up", 10*time.Second); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := env.ExitCode(cmd.Wait()); got != 9 {
		t.Errorf("exit code after SIGTERM = %d; want 9", got)
	}
	if err := cmd.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("Signal after the end = %v; want os.ErrProcessDone", err)
	}
}

// The drop-in must mean to containerd what it says.
func TestDropIn(t *testing.T) {
	root, err := tools.Root()
	if err != nil {
		t.Fatal(err)
	}
	for _, branch := range []string{"2.3", "2.4"} {
		t.Run(branch, func(t *testing.T) {
			ctx := env.Context(t)
			e := env.ForTest(t, env.Config{
				Containerd: branch,
				Imports:    []string{filepath.Join(root, "deploy/containerd/*.toml")},
			})
			out, err := e.Command(ctx, "containerd", "--config", filepath.Join(e.Dir, "containerd.toml"), "config", "dump").Run()
			if err != nil {
				t.Fatal(err)
			}
			_, section, found := strings.Cut(out, ".containerd.runtimes.vmrt]\n")
			section, _, _ = strings.Cut(section, "\n\n")
			for _, want := range []string{"runtime_type = 'io.containerd.vmrt.v2'", "privileged_without_host_devices = true"} {
				if !found || !strings.Contains(section, want) {
					t.Errorf("configuration of the runtime = %q; want %s", section, want)
				}
			}
		})
	}
}
