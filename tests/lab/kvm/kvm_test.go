// Package kvm tests what needs a real KVM and the kernel's vsock transport,
// which `make test-kvm` provides in a nested machine.
package kvm

import (
	"bufio"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vmrt/vmrt/hack/tools"
	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/hypervisor/accel"
	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
	"github.com/vmrt/vmrt/tests/platform"
)

const runtimeName = "io.containerd.vmrt.v2"

// start runs a containerd whose virtual machines use KVM and vhost-vsock.
func start(t *testing.T) *env.Env {
	t.Helper()
	for _, dev := range []string{"/dev/kvm", "/dev/vhost-vsock"} {
		if _, err := os.Stat(dev); err != nil {
			if platform.Lab() {
				t.Fatal(err)
			}
			t.Skipf("needs %s: run `make test-kvm`", dev)
		}
	}
	env.NeedProgram(t, "qemu-system-x86_64", "busybox")
	root, err := tools.Root()
	if err != nil {
		t.Fatal(err)
	}
	e := env.ForTest(t, env.Config{BinDirs: []string{filepath.Join(root, "bin")}, VMRT: platform.Settings("")})
	measure(t, e)
	img, err := image.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Import(env.Context(t), img); err != nil {
		t.Fatal(err)
	}
	return e
}

// measure has the accelerator probed until it gave a verdict, which is then
// kept until the next boot. The probe's time limit is made for real machines;
// an emulated one needs some attempts to get its pages in.
func measure(t *testing.T, e *env.Env) {
	t.Helper()
	const attempts = 20
	for range attempts {
		out, err := e.Command(env.Context(t), "vmrtctl", "check").Run()
		if err == nil && strings.Contains(out, "kvm: ") {
			return
		}
		t.Logf("vmrtctl check (%v):\n%s", err, out)
		// A measurement is kept, also one that something else on the machine
		// has slowed down.
		if err := os.Remove(e.Path(filepath.Join(hypervisor.DefaultCacheDir, accel.CacheFile))); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	}
	t.Fatalf("KVM was not measured in %d attempts", attempts)
}

func TestKVMLifecycle(t *testing.T) {
	e := start(t)
	ctx := env.Context(t)

	const script = "cat /sys/devices/system/clocksource/clocksource0/available_clocksource; echo $1; exec sleep 1000"
	run := e.Ctr(ctx, "run", "--rm", "--runtime", runtimeName, image.BusyboxName, "c1", "sh", "-c", script, "sh", "word")
	stdout, err := run.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr strings.Builder
	run.Stderr = &stderr
	if err := run.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stdout)
	var output []string
	for len(output) < 2 && lines.Scan() {
		output = append(output, lines.Text())
	}
	if len(output) != 2 {
		t.Fatalf("the container printed %q and ended: %v: %s", output, run.Wait(), stderr.String())
	}
	if clocks := strings.Fields(output[0]); !slices.Contains(clocks, "kvm-clock") {
		t.Errorf("clock sources in the guest = %q; want kvm-clock among them", clocks)
	}
	if output[1] != "word" {
		t.Errorf("second line of the container = %q; want \"word\"", output[1])
	}

	const inExec = "echo out; echo err >&2; cat /proc/1/comm; exit 7"
	out, err := e.Ctr(ctx, "task", "exec", "--exec-id", "e1", "c1", "sh", "-c", inExec).Run()
	if got := env.ExitCode(err); out != "out\nsleep\n" || got != 7 {
		t.Errorf("ctr task exec = %q, code %d (%v); want \"out\\nsleep\\n\", code 7", out, got, err)
	}

	if _, err := e.Ctr(ctx, "task", "kill", "--signal", "SIGKILL", "c1").Run(); err != nil {
		t.Error(err)
	}
	if err := run.Wait(); env.ExitCode(err) != 137 {
		t.Errorf("ctr run of a container killed by SIGKILL = %v: %s; want exit code 137", err, stderr.String())
	}
}
