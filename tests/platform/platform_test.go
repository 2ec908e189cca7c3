package platform_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmrt/vmrt/pkg/config"
	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/tests/platform"
)

// TestSettings: what the environment chooses becomes a valid configuration, in
// which a test's own keys stay as they are.
func TestSettings(t *testing.T) {
	t.Setenv("VMRT_QEMU", "/opt/a b/qemu")
	t.Setenv("VMRT_VIRTIOFSD", "/opt/virtiofsd")
	t.Setenv("VMRT_LAB", "1")
	c, err := config.Parse("f", []byte(platform.Settings("cpus = 2\nvirtiofsd=\"/mine\"\n  boot_timeout = \"7s\"")))
	if err != nil {
		t.Fatal(err)
	}
	if c.QEMU != "/opt/a b/qemu" || c.Virtiofsd != "/mine" || c.CPUs != 2 || c.BootTimeout != 7*time.Second ||
		c.Accelerator != hypervisor.KVM || c.Vsock != config.VsockVhost {
		t.Errorf("Settings() = %+v", c)
	}
	for _, name := range []string{"VMRT_QEMU", "VMRT_VIRTIOFSD", "VMRT_LAB"} {
		t.Setenv(name, "")
	}
	if got := platform.Settings("cpus = 2\n"); got != "cpus = 2\n" {
		t.Errorf("Settings() of a plain machine = %q; want the test's own", got)
	}
}

// TestBuild builds a program of the tree, and takes one that is there.
func TestBuild(t *testing.T) {
	if testing.Short() {
		t.Skip("compiles a program")
	}
	t.Setenv("VMRT_PROGRAMS", "")
	const pkg = "hack/testsum"
	built, err := platform.Build(pkg, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if out, err := exec.CommandContext(ctx, built, "-h").CombinedOutput(); !strings.Contains(string(out), "-total") {
		t.Errorf("the program prints %q, %v; want its usage", out, err)
	}
	dir := t.TempDir()
	have := filepath.Join(dir, "hack-testsum")
	if err := os.WriteFile(have, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("VMRT_PROGRAMS", dir)
	if got, err := platform.Build(pkg, t.TempDir()); err != nil || got != have {
		t.Errorf("Build() = %s, %v; want %s", got, err, have)
	}
	if got, err := platform.Build("no/such/package", t.TempDir()); err == nil || !strings.Contains(err.Error(), "no/such/package") {
		t.Errorf("Build(no/such/package) = %s, %v; want an error that names it", got, err)
	}
}
