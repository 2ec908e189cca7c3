package check

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmrt/vmrt/guest"
)

// What is there and cannot be used fails, and hides nothing else.
func TestUnusable(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string, mode os.FileMode) string {
		t.Helper()
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(name, mode); err != nil { // whatever the umask
			t.Fatal(err)
		}
		return name
	}
	qemu := file("qemu", "#!/bin/sh\necho cannot load libfoo.so >&2\nexit 127\n", 0o755)
	for name, mode := range map[string]os.FileMode{guest.KernelFile: 0o600, guest.InitramfsFile: 0o644, guest.ManifestFile: 0o644} {
		file(filepath.Join(guest.Stock, name), "x", mode)
	}
	config := file("config.toml", fmt.Sprintf("qemu = %q\nguest_dir = %q\naccelerator = \"tcg\"\nvsock = \"vhost-user\"\n", qemu, dir), 0o644)

	want := map[string]string{ // the error; "" is none
		"configuration": "",
		"qemu":          "run " + qemu + " -version: exit status 127: cannot load libfoo.so",
		"guest":         "stock/vmlinux has mode 0600 and QEMU",
		"accelerator":   "",
		"vsock":         "",
	}
	for _, r := range Run(context.Background(), config) {
		w, ok := want[r.Name]
		if !ok {
			continue
		}
		delete(want, r.Name)
		if w == "" && r.Err != nil || w != "" && (r.Err == nil || !strings.Contains(r.Err.Error(), w)) {
			t.Errorf("%s: found %q, error %v; want error %q", r.Name, r.Found, r.Err, w)
		}
	}
	if len(want) > 0 {
		t.Errorf("no result for %v", want)
	}
}

func TestBadConfiguration(t *testing.T) {
	got := Run(context.Background(), filepath.Join(t.TempDir(), "absent"))
	if len(got) != 1 || got[0].Err == nil {
		t.Errorf("Run() without the file = %v; want one error", got)
	}
}
