package tools

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// A tool's description, its linker flags and its go.mod must name one version.
func TestVersions(t *testing.T) {
	root, err := Root()
	if err != nil {
		t.Fatal(err)
	}
	version := regexp.MustCompile(`v\d+\.\d+\.\d+`)
	for _, tool := range All {
		t.Run(tool.Name, func(t *testing.T) {
			mod, err := os.ReadFile(filepath.Join(tool.source(root), "go.mod"))
			if err != nil {
				t.Fatal(err)
			}
			want := version.FindString(tool.Doc)
			if !strings.Contains(string(mod), " "+want) {
				t.Errorf("go.mod does not have the version %q of %q", want, tool.Doc)
			}
			if !strings.HasSuffix(tool.LDFlags, "="+want) && !strings.HasSuffix(tool.LDFlags, "="+want[1:]) {
				t.Errorf("linker flags %q; want them to end with version %s", tool.LDFlags, want)
			}
		})
	}
}

func TestKey(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "go.mod")
	write := func(s string) {
		if err := os.WriteFile(file, []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	key := func(tool Tool) string {
		k, err := tool.key(dir)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	write("module a\n")
	first := key(Tool{Name: "a"})
	if got := key(Tool{Name: "a", Doc: "described"}); got != first {
		t.Errorf("key with a description = %s; want %s as without", got, first)
	}
	if got := key(Tool{Name: "a", Tags: []string{"x"}}); got == first {
		t.Errorf("key with a build tag = %s; want another one", got)
	}
	write("module b\n")
	if got := key(Tool{Name: "a"}); got == first {
		t.Errorf("key after a change of go.mod = %s; want another one", got)
	}
}

func TestBuildFindsCached(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	root, err := Root()
	if err != nil {
		t.Fatal(err)
	}
	tool, err := Lookup("runc")
	if err != nil {
		t.Fatal(err)
	}
	key, err := tool.key(tool.source(root))
	if err != nil {
		t.Fatal(err)
	}
	cache, err := CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	want := filepath.Join(cache, "tools", "runc-"+key)
	if err := os.MkdirAll(want, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", "") // nothing can be built
	if got, err := Build(context.Background(), "runc", nil); got != want || err != nil {
		t.Errorf("Build(runc) = %s, %v; want %s", got, err, want)
	}
	if _, err := Build(context.Background(), "cni", nil); err == nil || !strings.Contains(err.Error(), "build cni: ") {
		t.Errorf("Build(cni) without a go command = %v; want an error that names it", err)
	}
	if left, _ := filepath.Glob(filepath.Join(cache, "tools", ".building-*")); len(left) > 0 {
		t.Errorf("a failed build left %v", left)
	}
	if _, err := Build(context.Background(), "other", nil); err == nil {
		t.Error("Build(other) succeeded; want an error")
	}
}
