package containerd

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
)

const terminalTimeout = 60 * time.Second

// TestNerdctl is what a virtual machine makes different from runc, or what
// TestSameAsRunc cannot compare.
func TestNerdctl(t *testing.T) {
	e := start(t, "2.4", "nerdctl", "cni")
	ctx := env.Context(t)
	nerdctl := func(t *testing.T, args ...string) string {
		t.Helper()
		out, err := e.Nerdctl(ctx, args...).Run()
		if err != nil {
			t.Fatalf("nerdctl %s: %v", strings.Join(args, " "), err)
		}
		return out
	}
	run := []string{"run", "--runtime", runtimeName, "--net", "none"}
	nerdctl(t, append(run, "-d", "--name", "box", image.BusyboxName, "sleep", "1000")...)
	defer func() { nerdctl(t, "rm", "-f", "box") }()

	t.Run("terminal", func(t *testing.T) {
		cmd := e.Nerdctl(ctx, append(run, "-it", "--rm", image.BusyboxName, "sh")...)
		term, err := cmd.StartTerminal(40, 100)
		if err != nil {
			t.Fatal(err)
		}
		defer term.Close()
		at, err := term.Expect(0, "# ", terminalTimeout)
		if err != nil {
			t.Fatal(err)
		}
		term.Type("stty size; tty\n")
		if at, err = term.Expect(at, "/dev/pts/0", terminalTimeout); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(term.Output(), "40 100") {
			t.Errorf("terminal shows %q; want size 40 100", term.Output())
		}
		if err := term.Resize(50, 120); err != nil {
			t.Fatal(err)
		}
		term.Type("until stty size | grep '50 120'; do sleep 0.1; done; exit 9\n")
		if _, err := term.Expect(at, "50 120", terminalTimeout); err != nil {
			t.Error(err)
		}
		if got := env.ExitCode(cmd.Wait()); got != 9 {
			t.Errorf("exit code = %d; want 9", got)
		}
	})
	t.Run("attach", func(t *testing.T) {
		first, err := e.Nerdctl(ctx, append(run, "-it", "--name", "tty", image.BusyboxName, "sh")...).StartTerminal(24, 80)
		if err != nil {
			t.Fatal(err)
		}
		defer nerdctl(t, "rm", "-f", "tty")
		defer first.Close()
		if _, err := first.Expect(0, "# ", terminalTimeout); err != nil {
			t.Fatal(err)
		}
		first.Type("\x10\x11") // ctrl-p ctrl-q detaches
		if _, err := first.Expect(0, "detach", terminalTimeout); err != nil {
			t.Fatal(err)
		}
		cmd := e.Nerdctl(ctx, "attach", "tty")
		term, err := cmd.StartTerminal(24, 80)
		if err != nil {
			t.Fatal(err)
		}
		defer term.Close()
		term.Type("echo $((6*7))\n")
		if _, err := term.Expect(0, "42", terminalTimeout); err != nil {
			t.Error(err)
		}
		term.Type("exit 4\n")
		cmd.Wait()
		if got := strings.TrimSpace(nerdctl(t, "wait", "tty")); got != "4" {
			t.Errorf("exit code = %s; want 4", got)
		}
	})
	t.Run("stats", func(t *testing.T) {
		got := nerdctl(t, "stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}} {{.MemUsage}}", "box")
		if !strings.HasPrefix(got, "box 1 ") || strings.Contains(got, "0B /") {
			t.Errorf("stats = %q; want one process and some memory", got)
		}
	})
	t.Run("top", func(t *testing.T) {
		if got := nerdctl(t, "top", "box"); !strings.Contains(got, "vmrt: sleep 1000") {
			t.Errorf("top = %q; want the anchor of sleep", got)
		}
	})
	t.Run("host network", func(t *testing.T) {
		got := nerdctl(t, "run", "--runtime", runtimeName, "--net", "host", "--rm", image.BusyboxName, "hostname")
		if host, err := os.Hostname(); err != nil || strings.TrimSpace(got) != host {
			t.Errorf("hostname in the host's network = %q; want %q, %v", got, host, err)
		}
	})
	t.Run("privileged", func(t *testing.T) {
		got := nerdctl(t, append(run, "--rm", "--privileged", image.BusyboxName, "sh", "-c",
			"mount -t tmpfs t /mnt && echo mounted; grep CapEff /proc/self/status")...)
		if !strings.HasPrefix(got, "mounted\nCapEff:\t000001f") {
			t.Errorf("privileged container = %q; want a mount and the host's capabilities", got)
		}
	})
	t.Run("volume", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.WriteFile(dir+"/f", []byte("volume\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		got := nerdctl(t, append(run, "--rm", "-v", dir+":/v:ro", "-v", "named:/n", image.BusyboxName, "sh", "-c",
			"cat /v/f; touch /v/x 2>/dev/null || echo ro; echo kept > /n/f")...)
		if got != "volume\nro\n" {
			t.Errorf("container saw %q; want the file, read-only", got)
		}
		if got := nerdctl(t, append(run, "--rm", "-v", "named:/n", image.BusyboxName, "cat", "/n/f")...); got != "kept\n" {
			t.Errorf("named volume holds %q; want kept", got)
		}
		nerdctl(t, "volume", "rm", "named")
	})
	t.Run("logs are whole", func(t *testing.T) {
		const lines = 20000
		nerdctl(t, append(run, "-d", "--name", "talk", image.BusyboxName, "seq", fmt.Sprint(lines))...)
		nerdctl(t, "wait", "talk")
		if got := strings.Count(nerdctl(t, "logs", "talk"), "\n"); got != lines {
			t.Errorf("logs have %d lines; want %d", got, lines)
		}
		nerdctl(t, "rm", "talk")
	})
}
