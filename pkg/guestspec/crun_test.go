package guestspec

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// seen is what a process finds in its container.
type seen struct {
	Hostname  string
	Files     map[string]string
	ReadOnly  map[string]bool
	TmpSize   uint64
	NoNewPriv string
	UID, GID  int
}

const seenEnv = "GUESTSPEC_TEST_CONTAINER"

// TestMain is the container's process too.
func TestMain(m *testing.M) {
	if os.Getenv(seenEnv) == "" {
		os.Exit(m.Run())
	}
	s := seen{Files: map[string]string{}, ReadOnly: map[string]bool{}, UID: os.Getuid(), GID: os.Getgid()}
	s.Hostname, _ = os.Hostname()
	for _, dir := range []string{"/rw", "/ro", "/rro"} {
		b, _ := os.ReadFile(filepath.Join(dir, "file"))
		s.Files[dir] = string(b)
		err := os.WriteFile(filepath.Join(dir, "written"), nil, 0o600)
		s.ReadOnly[dir] = err != nil && strings.Contains(err.Error(), "read-only file system")
	}
	var fs unix.Statfs_t
	_ = unix.Statfs("/tmp", &fs)
	s.TmpSize = fs.Blocks * uint64(fs.Bsize)
	status, _ := os.ReadFile("/proc/self/status")
	for _, line := range strings.Split(string(status), "\n") {
		if v, ok := strings.CutPrefix(line, "NoNewPrivs:"); ok {
			s.NoNewPriv = strings.TrimSpace(v)
		}
	}
	_ = json.NewEncoder(os.Stdout).Encode(s)
	os.Exit(0)
}

// TestCrunRunsPlan hands a rewritten spec to the OCI runtime that guests use,
// here on the host, with the host's folders at the sources that the plan names.
func TestCrunRunsPlan(t *testing.T) {
	crun, err := exec.LookPath("crun")
	if err != nil {
		t.Skip("crun is not installed")
	}
	if os.Getuid() != 0 {
		t.Skip("not root")
	}
	bundle, data := t.TempDir(), t.TempDir()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{filepath.Join(bundle, "rootfs/test"): self, filepath.Join(data, "file"): []byte("shared")} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, content, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var libraries []specs.Mount // for a test binary that is linked dynamically
	for _, dir := range []string{"/usr", "/lib", "/lib64"} {
		if _, err := os.Stat(dir); err == nil {
			libraries = append(libraries, specs.Mount{Destination: dir, Type: "bind", Source: dir, Options: []string{"rbind", "ro"}})
		}
	}
	plan, err := rewrite(t, func(s *specs.Spec) {
		s.Process.Args = []string{"/test"}
		s.Process.Env = []string{seenEnv + "=1"}
		s.Process.ApparmorProfile = "no-such-profile"
		s.Process.SelinuxLabel = "no:such:label:s0"
		s.Annotations = map[string]string{"run.oci.handler": "no-such-handler"}
		// The limits are for the guest's cgroup v2.
		s.Linux.Resources = nil
		s.Mounts = append(s.Mounts, libraries...)
		s.Mounts = append(s.Mounts,
			specs.Mount{Destination: "/rw", Type: "bind", Source: data, Options: []string{"rbind", "rw", "silent"}},
			specs.Mount{Destination: "/ro", Type: "none", Source: data, Options: []string{"rbind", "ro", "rslave"}},
			specs.Mount{Destination: "/rro", Type: "bind", Source: data, Options: []string{"rbind", "rro"}},
			specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: data, Options: []string{"size=64k", "mode=1777", "context=x"}},
		)
	})
	if err != nil {
		t.Fatal(err)
	}
	for i, b := range plan.Binds {
		plan.SetSource(i, b.Source)
	}
	for i, ns := range plan.Spec.Linux.Namespaces {
		if ns.Type == specs.NetworkNamespace {
			// Here that would be the host's.
			plan.Spec.Linux.Namespaces[i].Path = ""
		}
	}
	config, err := Encode(plan.Spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), config, 0o600); err != nil {
		t.Fatal(err)
	}
	// As in the guest, there is cgroup v2 alone.
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", `mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec "$@"`,
		"sh", crun, "--root", t.TempDir(), "--cgroup-manager=disabled", "run", "--bundle", bundle, "guestspec-test")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("crun run: %v: %s", err, stderr.String())
	}
	var got seen
	if err := json.Unmarshal(stdout.Bytes(), &got); err != nil {
		t.Fatalf("output %q: %v", stdout.String(), err)
	}
	want := seen{
		Hostname:  "web",
		Files:     map[string]string{"/rw": "shared", "/ro": "shared", "/rro": "shared"},
		ReadOnly:  map[string]bool{"/rw": false, "/ro": true, "/rro": true},
		TmpSize:   64 << 10,
		NoNewPriv: "1",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("in the container (-want +got):\n%s", diff)
	}
}
