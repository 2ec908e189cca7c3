package tools

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestEdit(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "a.go")
	for _, tt := range []struct {
		name, text, want string
		ok               bool
	}{
		{"once", "x = old", "x = new", true},
		{"absent", "x = other", "x = other", false},
		{"twice", "old old", "old old", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := os.WriteFile(file, []byte(tt.text), 0o644); err != nil {
				t.Fatal(err)
			}
			err := Edit{Module: "example.org/m", File: "a.go", Old: "old", New: "new"}.apply(dir)
			got, readErr := os.ReadFile(file)
			if (err == nil) != tt.ok || readErr != nil || string(got) != tt.want {
				t.Errorf("apply = %v, file %q; want success %v, file %q", err, got, tt.ok, tt.want)
			}
			if err != nil && !strings.Contains(err.Error(), "edit example.org/m: a.go has ") {
				t.Errorf("apply = %v; want an error that names module and file", err)
			}
		})
	}
}

// An edited copy of a module replaces it, and nothing else of go.mod changes.
func TestEditModule(t *testing.T) {
	tool, err := Lookup("critest")
	if err != nil {
		t.Fatal(err)
	}
	root, err := Root()
	if err != nil {
		t.Fatal(err)
	}
	src := tool.source(root)
	cache := t.TempDir()
	if err := fakeDownload(t, cache, tool.Edits[0]); err != nil {
		t.Fatal(err)
	}
	modfile, err := tool.edit(t.Context(), src)
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(filepath.Dir(modfile))
	mod, err := os.ReadFile(filepath.Join(src, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(modfile)
	if err != nil {
		t.Fatal(err)
	}
	e := tool.Edits[0]
	rest, ok := strings.CutPrefix(string(got), string(mod))
	if !ok || !strings.HasPrefix(rest, "\nreplace "+e.Module+" => "+filepath.Dir(modfile)+"/") {
		t.Errorf("go.mod ends with %q; want a replacement of %s", rest, e.Module)
	}
	edited, err := os.ReadFile(filepath.Join(strings.Fields(rest)[3], e.File))
	if err != nil || string(edited) != "package x // "+e.New+"\n" {
		t.Errorf("%s = %q, %v; want it edited", e.File, edited, err)
	}
}

// fakeDownload puts a go command into PATH that has a module at hand, with the
// file that is to be edited.
func fakeDownload(t *testing.T, dir string, e Edit) error {
	t.Helper()
	module := filepath.Join(dir, "module")
	file := filepath.Join(module, e.File)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(file, []byte("package x // "+e.Old+"\n"), 0o444); err != nil {
		return err
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return os.WriteFile(filepath.Join(dir, "go"), []byte("#!/bin/sh\necho '{\"Dir\": \""+module+"\"}'\n"), 0o755)
}
