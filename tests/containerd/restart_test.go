package containerd

import (
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/vmrt/vmrt/tests/env"
)

// restartMonitor has containerd look more often than every 10 s.
const restartMonitor = `
[plugins.'io.containerd.internal.v1.restart']
  interval = "1s"
`

// TestRestart is about --restart: containerd starts a container that has ended
// again, under the same id, in a virtual machine of its own.
func TestRestart(t *testing.T) {
	e := startWith(t, env.Config{Tools: []string{"runc", "nerdctl", "cni"}, ExtraConfig: restartMonitor})
	t.Run("same as runc", func(t *testing.T) { nerdctl.compare(t, e, restartScenarios) })

	t.Run("virtual machine killed", func(t *testing.T) {
		ctx := env.Context(t)
		run := func(args ...string) string {
			t.Helper()
			out, err := e.Nerdctl(ctx, args...).Run()
			if err != nil {
				t.Fatalf("nerdctl %s: %v", strings.Join(args, " "), err)
			}
			return out
		}
		run("run", "--runtime", runtimeName, "--net", "none", "-d", "--restart", "always", "--name", "box", busybox,
			"sh", "-c", "cat /proc/sys/kernel/random/boot_id; exec sleep 1000")
		defer func() { run("rm", "-f", "box") }()
		boots := func(n int) []string {
			t.Helper()
			for deadline := time.Now().Add(untilTimeout); ; time.Sleep(300 * time.Millisecond) {
				out, err := e.Nerdctl(ctx, "logs", "box").Run()
				if lines := strings.Fields(out); err == nil && len(lines) >= n {
					return lines
				}
				if time.Now().After(deadline) {
					t.Fatalf("logs = %q, %v; want %d runs", out, err, n)
				}
			}
		}
		boots(1)
		pids := regexp.MustCompile(`msg="virtual machine is ready".* pid=(\d+)`).FindAllStringSubmatch(e.Log(), -1)
		if len(pids) == 0 {
			t.Fatal("containerd's log names no virtual machine")
		}
		pid := pids[len(pids)-1][1]
		if exe, err := os.Readlink(e.Path("/proc/" + pid + "/exe")); err != nil || !strings.Contains(exe, "qemu") {
			t.Fatalf("process %s is %s (%v); want QEMU", pid, exe, err)
		}
		if _, err := e.Command(ctx, "kill", "-KILL", pid).Run(); err != nil {
			t.Fatal(err)
		}
		boots(2)
		if got := run("inspect", "-f", "{{.State.Status}}", "box"); got != "running\n" {
			t.Errorf("inspect = %q; want it running again", got)
		}
		// The count of restarts is no measure: the monitor counts a try each
		// time it looks during a boot.
		if ids := boots(2); len(ids) != 2 || ids[0] == ids[1] {
			t.Errorf("boot ids of the runs = %v; want two machines", ids)
		}
	})
}
