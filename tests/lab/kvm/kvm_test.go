// Package kvm tests what needs a real KVM and the kernel's vsock transport,
// which `make test-kvm` provides in a nested machine.
package kvm

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vmrt/vmrt/hack/tools"
	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
)

const runtimeName = "io.containerd.vmrt.v2"

// config leaves nothing to choose, and much time: an emulated machine runs the
// virtual machine.
const config = `accelerator = "kvm"
vsock = "vhost"
boot_timeout = "5m"
`

// start runs a containerd whose virtual machines use KVM and vhost-vsock.
func start(t *testing.T) *env.Env {
	t.Helper()
	for _, dev := range []string{"/dev/kvm", "/dev/vhost-vsock"} {
		if _, err := os.Stat(dev); err != nil {
			if os.Getenv("VMRT_LAB") != "" {
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
	e := env.ForTest(t, env.Config{BinDirs: []string{filepath.Join(root, "bin")}, VMRT: config})
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
	}
	t.Fatalf("KVM was not measured in %d attempts", attempts)
}

func TestKVMLifecycle(t *testing.T) {
	e := start(t)
	ctx := env.Context(t)
	ctr := func(args ...string) string {
		t.Helper()
		out, err := e.Ctr(ctx, args...).Run()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}

	const script = "cat /sys/devices/system/clocksource/clocksource0/available_clocksource; echo $1; sleep 1000"
	ctr("run", "--detach", "--runtime", runtimeName, "--log-uri", "file://"+filepath.Join(e.Dir, "c1.log"),
		image.BusyboxName, "c1", "sh", "-c", script, "sh", "word")

	const inExec = "echo out; echo err >&2; cat /proc/1/comm; exit 7"
	out, err := e.Ctr(ctx, "task", "exec", "--exec-id", "e1", "c1", "sh", "-c", inExec).Run()
	if got := env.ExitCode(err); out != "out\nsh\n" || got != 7 {
		t.Errorf("ctr task exec = %q, code %d (%v); want \"out\\nsh\\n\", code 7", out, got, err)
	}

	ctr("task", "kill", "--signal", "SIGKILL", "c1")
	// Delete waits for the end, and returns the container's exit code.
	_, err = e.Ctr(ctx, "task", "delete", "c1").Run()
	if got := env.ExitCode(err); got != 137 {
		t.Errorf("exit code after SIGKILL = %d (%v); want 137", got, err)
	}
	ctr("container", "delete", "c1")

	log, err := os.ReadFile(filepath.Join(e.Dir, "c1.log"))
	if err != nil {
		t.Fatal(err)
	}
	words := strings.Fields(string(log))
	if !slices.Contains(words, "kvm-clock") {
		t.Errorf("clock sources in the guest = %q; want kvm-clock among them", log)
	}
	if len(words) == 0 || words[len(words)-1] != "word" {
		t.Errorf("output of the container = %q; want it to end with \"word\"", log)
	}
}
