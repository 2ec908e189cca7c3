package conformance

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
)

// vmrtctl runs the operator's tool with the shim's configuration.
func (s *shim) vmrtctl(args ...string) string {
	s.t.Helper()
	out, err := exec.Command(filepath.Join(shimDir(s.t), "vmrtctl"), append([]string{"--config", s.config}, args...)...).CombinedOutput()
	if err != nil {
		s.t.Errorf("vmrtctl %s = %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// checkedKernel is the kernel that `vmrtctl check` says is used.
var checkedKernel = func() func(testing.TB) string {
	kernel := sync.OnceValues(func() (string, error) {
		// What fails is another test's business.
		out, _ := exec.Command(filepath.Join(binDir(), "vmrtctl"), "check").Output()
		if m := regexp.MustCompile(`(?m)^ok +guest +(\S+) kernel, `).FindSubmatch(out); m != nil {
			return string(m[1]), nil
		}
		return "", fmt.Errorf("vmrtctl check names no kernel: %s", out)
	})
	return func(t testing.TB) string {
		t.Helper()
		k, err := kernel()
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
}()

// TestVmrtctl: the operator sees what machines can be made here, and those that
// there are.
func TestVmrtctl(t *testing.T) {
	s := newShim(t, args("sleep", "1000"))
	accelerator, err := measured()
	if err != nil {
		t.Fatal(err)
	}
	check := s.vmrtctl("check")
	for _, want := range []string{
		`configuration +` + regexp.QuoteMeta(s.config), `user +uid 0`, `shim +/.*/containerd-shim-vmrt-v2`, `qemu +/\S+, version \d+\.\d+`, `virtiofsd +/`,
		`guest +(tuned|stock) kernel, /.*/vmlinu[xz]`, `accelerator +` + string(accelerator) + `: \S+ .*`, `vsock +vhost`,
	} {
		if !regexp.MustCompile(`(?m)^ok +` + want).MatchString(check) {
			t.Errorf("vmrtctl check =\n%s\nwant a line ok %s", check, want)
		}
	}
	if got := s.vmrtctl("version"); !regexp.MustCompile(`^vmrtctl \S+ [0-9a-f]{40}\n$`).MatchString(got) {
		t.Errorf("vmrtctl version = %q; want version and revision", got)
	}
	name, own := filepath.Join(shimDir(t), "containerd-shim-vmrt-v2"), strings.Fields(s.vmrtctl("version"))
	out, err := exec.Command(name, "-v").Output()
	if got := strings.Fields(string(out)); err != nil || len(own) != 3 || !slices.Contains(got, own[1]) || !slices.Contains(got, own[2]) {
		t.Errorf("%s -v = %q, %v; want what vmrtctl says, %q", name, out, err, own)
	}
	list := func() []string {
		t.Helper()
		lines := strings.Split(strings.TrimSpace(s.vmrtctl("list")), "\n")
		if !strings.HasPrefix(lines[0], "NAMESPACE") {
			t.Errorf("vmrtctl list begins with %q; want a header", lines[0])
		}
		return lines[1:]
	}
	if got := list(); len(got) != 0 {
		t.Errorf("vmrtctl list = %q; want nothing before there is a machine", got)
	}
	s.mustCreate(nil, false)
	want := regexp.MustCompile(fmt.Sprintf(`^%s +%s +1 +%d +(tuned|stock) +%s +vhost\S* +\S+ +running$`, namespace, s.id, s.findVM(), accelerator))
	if got := list(); len(got) != 1 || !want.MatchString(got[0]) {
		t.Errorf("vmrtctl list = %q; want one line that matches %v", got, want)
	}
	s.mustStart("")
	s.remove()
}

// An installation that lacks something fails the check, which says what.
func TestVmrtctlCheckFails(t *testing.T) {
	requireVM(t)
	config := filepath.Join(t.TempDir(), "config.toml")
	write(t, config, "qemu = \"/nonexistent/qemu\"\n", 0o644)
	out, err := exec.Command(filepath.Join(shimDir(t), "vmrtctl"), "--config", config, "check").CombinedOutput()
	if err == nil || !regexp.MustCompile(`(?m)^FAIL +qemu .*/nonexistent/qemu`).Match(out) ||
		!regexp.MustCompile(`(?m)^ok +accelerator `).Match(out) {
		t.Errorf("vmrtctl check = %v: %s; want QEMU to fail and the rest to be checked", err, out)
	}
}

// Programs stay small: each pod has a shim, and each boot loads an agent.
func TestProgramSizes(t *testing.T) {
	requireVM(t)
	for name, limit := range map[string]int64{"containerd-shim-vmrt-v2": 14e6, "vm-agent": 12e6} {
		path := filepath.Join(shimDir(t), name)
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if fi.Size() > limit {
			t.Errorf("%s has %d bytes; want at most %d", path, fi.Size(), limit)
		}
	}
}

// A containerd before 2.3 gives a shim nothing to read when it starts it. It is
// told that this cannot work, and nothing is left.
func TestOldContainerd(t *testing.T) {
	requireVM(t)
	bundle := t.TempDir()
	cmd := exec.Command(filepath.Join(shimDir(t), "containerd-shim-vmrt-v2"),
		"-namespace", namespace, "-id", newID(), "-address", filepath.Join(bundle, "containerd.sock"), "start")
	cmd.Dir = bundle
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	// README.md names these words.
	if err == nil || stdout.Len() > 0 || !strings.Contains(stderr.String(), "shim was started through the deprecated API") {
		t.Errorf("shim start = %v, stdout %q, stderr %q; want an error of the API", err, stdout.Bytes(), stderr.Bytes())
	}
	if left, _ := os.ReadDir(bundle); len(left) > 0 {
		t.Errorf("left in the bundle: %v", left)
	}
}
