package cgroup

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

// The files are those that the kernel shows, in folders that are none of its own.
func TestParentMemory(t *testing.T) {
	const slice = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice"
	v1, v2 := t.TempDir(), t.TempDir()
	for _, f := range []struct{ root, dir, file, content string }{
		{v2, "kubepods/pod1", "memory.max", "1073741824\n"},
		{v2, "kubepods/unlimited", "memory.max", "max\n"},
		{v2, "kubepods/odd", "memory.max", "much\n"},
		{v2, "kubepods/nobody", "cgroup.procs", ""},
		{v2, slice, "memory.max", "268435456\n"},
		{v1, "kubepods/pod1", "memory.limit_in_bytes", "536870912\n"},
		{v1, "kubepods/unlimited", "memory.limit_in_bytes", "9223372036854771712\n"},
		{v1, slice, "memory.limit_in_bytes", "134217728\n"},
		{v1, "", "memory.limit_in_bytes", "9223372036854771712\n"},
	} {
		if err := os.MkdirAll(filepath.Join(f.root, f.dir), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(f.root, f.dir, f.file), []byte(f.content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	memory := hierarchy{root: v1, controllers: []string{"memory"}}
	kinds := map[string][]hierarchy{
		"v2": {{root: v2, v2: true}},
		"v1": {{root: v1, controllers: []string{"pids"}}, memory},
		// cgroup v2 beside v1 without its controllers.
		"hybrid": {{root: t.TempDir(), v2: true}, memory},
	}
	const systemd = "kubepods-burstable-pod1.slice:cri-containerd:id"
	for _, tt := range []struct {
		kind, path string
		want       uint64
	}{
		{"v2", "/kubepods/pod1/id", 1 << 30},
		{"v2", systemd, 256 << 20},
		{"v2", "/kubepods/unlimited/id", 0},
		{"v2", "/kubepods/nobody/id", 0},
		{"v2", "/kubepods/gone/id", 0},
		{"v2", "/id", 0},
		{"v1", "/kubepods/pod1/id", 512 << 20},
		{"v1", "kubepods/pod1/id/", 512 << 20},
		{"v1", systemd, 128 << 20},
		{"v1", "/kubepods/unlimited/id", 0},
		{"v1", "/id", 0},
		{"hybrid", "/kubepods/pod1/id", 512 << 20},
		{"hybrid", systemd, 128 << 20},
	} {
		t.Run(fmt.Sprintf("%s %s", tt.kind, tt.path), func(t *testing.T) {
			if got, err := parentMemory(kinds[tt.kind], tt.path); err != nil || got != tt.want {
				t.Errorf("parentMemory(%q) = %d, %v; want %d", tt.path, got, err, tt.want)
			}
		})
	}
	if got, err := parentMemory(kinds["v2"], "/kubepods/odd/id"); err == nil {
		t.Errorf("parentMemory with a limit of %q = %d; want an error", "much", got)
	}
	for _, path := range []string{"", "/", "x:y:z"} {
		if got, err := parentMemory(kinds["v2"], path); !errdefs.IsInvalidArgument(err) {
			t.Errorf("parentMemory(%q) = %d, %v; want an invalid argument", path, got, err)
		}
	}
}
