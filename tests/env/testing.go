package env

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/vmrt/vmrt/hack/tools"
	"github.com/vmrt/vmrt/tests/env/image"
)

// ForTest starts an environment that ends with the test. The test is skipped,
// with the reason, on a machine that cannot run one, unless Require says that
// it must. At the end the test fails if it left anything behind; a failed
// test logs the end of containerd's log.
//
// VMRT_KEEP=1 keeps the folder of the environment.
func ForTest(t testing.TB, cfg Config) *Env {
	t.Helper()
	NeedRoot(t)
	if cfg.Progress == nil {
		cfg.Progress = os.Stderr
	}
	e, err := Start(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		left, err := e.Leftovers(context.Background())
		if err != nil {
			t.Error(err)
		}
		for _, item := range left {
			t.Errorf("the test left behind: %s", item)
		}
		if t.Failed() {
			t.Logf("end of %s:\n%s", e.logPath(), e.LogTail(60))
			if cfg.Docker != "" {
				t.Logf("%s:\n%s", e.dockerLog(), e.DockerLog())
			}
		}
		if err := e.Stop(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// Required reports whether tests that need root or a virtual machine must
// run: VMRT_REQUIRE_VM=1, set in CI.
func Required() bool { return os.Getenv("VMRT_REQUIRE_VM") == "1" }

// SkipOrFail skips the test because the machine lacks something, or fails it
// when Required.
func SkipOrFail(t testing.TB, format string, args ...any) {
	t.Helper()
	if Required() {
		t.Fatalf("VMRT_REQUIRE_VM=1, but: "+format, args...)
	}
	t.Skipf(format, args...)
}

// NeedRoot skips the test without root.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		SkipOrFail(t, "needs root")
	}
}

// NeedProgram skips the test unless each program is in PATH.
func NeedProgram(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			SkipOrFail(t, "needs %s, which is not in PATH", name)
		}
	}
}

// NeedBuild returns the folder of what `make build` makes, or the one that
// VMRT_BIN names, and skips the test if that is not there.
func NeedBuild(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("VMRT_BIN")
	if dir == "" {
		root, err := tools.Root()
		if err != nil {
			t.Fatal(err)
		}
		dir = filepath.Join(root, "bin")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "guest")); err != nil {
		SkipOrFail(t, "needs `make build`: %v", err)
	}
	return dir
}

// Context returns a context that ends somewhat before the test's deadline, so
// that clean-up has time, and with the test at the latest.
func Context(t testing.TB) context.Context {
	t.Helper()
	ctx := t.Context()
	if d, ok := t.(interface{ Deadline() (time.Time, bool) }); ok {
		if deadline, ok := d.Deadline(); ok {
			var cancel context.CancelFunc
			ctx, cancel = context.WithDeadline(ctx, deadline.Add(-30*time.Second))
			t.Cleanup(cancel)
		}
	}
	return ctx
}

// Import writes the images into an archive and imports it.
func (e *Env) Import(ctx context.Context, images ...image.Image) error {
	var buf bytes.Buffer
	if err := image.Write(&buf, images...); err != nil {
		return err
	}
	f := filepath.Join(e.Dir, "images.tar")
	if err := os.WriteFile(f, buf.Bytes(), 0o644); err != nil {
		return err
	}
	_, err := e.Ctr(ctx, "images", "import", "--snapshotter", e.cfg.Snapshotter, f).Run()
	return err
}
