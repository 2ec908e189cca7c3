package cpu

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// sysfs makes a folder like the kernel's: "1" and "0" for each CPU's online
// file, "-" for one that has none.
func sysfs(t *testing.T, cpus ...string) string {
	t.Helper()
	root := t.TempDir()
	for i, online := range cpus {
		dir := filepath.Join(root, fmt.Sprintf("cpu%d", i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if online != "-" {
			if err := os.WriteFile(filepath.Join(dir, "online"), []byte(online), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, other := range []string{"cpufreq", "cpuidle"} {
		if err := os.Mkdir(filepath.Join(root, other), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestSetOnline(t *testing.T) {
	for _, tt := range []struct {
		before []string
		count  int
		want   string // the online files, in order of CPUs
		err    error
	}{
		{[]string{"-", "0", "0", "0"}, 3, "-110", nil},
		{[]string{"-", "1", "1", "1"}, 2, "-100", nil},
		{[]string{"-", "1", "0", "1"}, 4, "-111", nil},
		{[]string{"-", "0", "1", "0"}, 1, "-000", nil},
		{[]string{"1", "1"}, 1, "10", nil}, // CPU 0 stays
		{[]string{"-", "1"}, 2, "-1", nil},
		{[]string{"-", "1"}, 0, "-1", errdefs.ErrOutOfRange},
		{[]string{"-", "1"}, 3, "-1", errdefs.ErrOutOfRange},
	} {
		root := sysfs(t, tt.before...)
		if err := SetOnline(root, tt.count); !errors.Is(err, tt.err) {
			t.Errorf("SetOnline(%v, %d) = %v; want %v", tt.before, tt.count, err, tt.err)
		}
		var got strings.Builder
		for i := range tt.before {
			b, err := os.ReadFile(filepath.Join(root, fmt.Sprintf("cpu%d", i), "online"))
			if err != nil {
				b = []byte("-")
			}
			got.Write(b)
		}
		if got.String() != tt.want {
			t.Errorf("SetOnline(%v, %d) left %s; want %s", tt.before, tt.count, got.String(), tt.want)
		}
		online, err := Online(root)
		if want := strings.Count(strings.ReplaceAll(tt.want, "-", "1"), "1"); online != want || err != nil {
			t.Errorf("Online() after SetOnline(%v, %d) = %d, %v; want %d", tt.before, tt.count, online, err, want)
		}
	}
}

// CPUs are numbers, not names: cpu10 comes after cpu9.
func TestOrder(t *testing.T) {
	before := []string{"-", "0", "0", "0", "0", "0", "0", "0", "0", "0", "0"}
	root := sysfs(t, before...)
	if err := SetOnline(root, 3); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(filepath.Join(root, "cpu10", "online")); string(b) != "0" {
		t.Errorf("cpu10 online = %q; want 0", b)
	}
}
