package conformance

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/vmrt/vmrt/api"
)

// An agent of another release, whose protocol is another, is an error of Create
// that names both, as soon as the agent has said so. Nothing is left.
func TestOtherProtocol(t *testing.T) {
	requireVM(t)
	const (
		protocol = api.ProtocolVersion + 1
		version  = "v9.8.7-other"
		// More than a boot takes, so that the time cannot be mistaken for it.
		timeout = time.Minute
	)
	s := newShim(t, options{config: fmt.Sprintf("guest_dir = %q\nboot_timeout = %q", otherGuest(t, protocol, version), timeout)})
	begin := time.Now()
	_, err := s.create(nil, false)
	if took := time.Since(begin); took > timeout {
		t.Errorf("Create took %v; want an answer within boot_timeout, which is %v", took, timeout)
	}
	if err == nil {
		t.Fatal("Create = nil; want an error")
	}
	want := regexp.MustCompile(fmt.Sprintf(`boot virtual machine of sandbox \S+: agent "%s" in the guest's initramfs speaks protocol %d, this shim \(.+\) %d: install shim and guest files of one release`,
		regexp.QuoteMeta(version), protocol, api.ProtocolVersion))
	if !want.MatchString(err.Error()) {
		t.Errorf("Create = %v; want it to match %s", err, want)
	}
	t.Logf("Create = %v, after %v", err, time.Since(begin))
	for _, word := range []string{"boot_timeout", "console", "stopped"} {
		if strings.Contains(err.Error(), word) {
			t.Errorf("Create = %v; want nothing of what follows, such as %q", err, word)
		}
	}
	if got := status.Code(err); got != codes.FailedPrecondition {
		t.Errorf("kind of the error = %v; want %v", got, codes.FailedPrecondition)
	}
}

// otherGuest makes guest files with an agent that is this one but for the
// protocol that it says.
func otherGuest(t *testing.T, protocol int, version string) string {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	original := filepath.Join(root, "api", "api.go")
	b, err := os.ReadFile(original)
	if err != nil {
		t.Fatal(err)
	}
	line := fmt.Sprintf("const ProtocolVersion = %d\n", api.ProtocolVersion)
	if strings.Count(string(b), line) != 1 {
		t.Fatalf("%s has not one line %q", original, line)
	}
	changed := strings.Replace(string(b), line, fmt.Sprintf("const ProtocolVersion = %d\n", protocol), 1)
	replacement, overlay, agent := filepath.Join(dir, "api.go"), filepath.Join(dir, "overlay.json"), filepath.Join(dir, "vm-agent")
	j, err := json.Marshal(map[string]map[string]string{"Replace": {original: replacement}})
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{replacement: changed, overlay: string(j)} {
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	build := exec.Command("go", "build", "-overlay", overlay, "-trimpath", "-buildvcs=false", "-tags", "no_grpc",
		"-ldflags", "-s -w -X github.com/vmrt/vmrt/pkg/version.Version="+version, "-o", agent, "./cmd/vm-agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	guest := filepath.Join(dir, "guest")
	for _, cmd := range []*exec.Cmd{build, exec.Command("guest/assemble.sh", agent, version, guest)} {
		cmd.Dir = root
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", cmd, err, out)
		}
	}
	return guest
}
