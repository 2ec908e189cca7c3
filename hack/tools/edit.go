package tools

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Edit replaces one piece of text in a module that a tool is built from. The
// module is still the one that go.sum fixes: a copy of it is edited.
type Edit struct {
	// Module is the module's path.
	Module string
	// File is a file's path in the module.
	File string
	// Old must occur exactly once.
	Old, New string
}

// edit copies the modules that are to be edited, makes the edits, and returns
// a file like go.mod that uses the copies. Its folder, which holds all of it,
// is the caller's to remove. The result is empty if there is nothing to edit.
func (t Tool) edit(ctx context.Context, src string) (modfile string, err error) {
	if len(t.Edits) == 0 {
		return "", nil
	}
	dir, err := os.MkdirTemp("", "vmrt-edit-")
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	mod, err := os.ReadFile(filepath.Join(src, "go.mod"))
	if err != nil {
		return "", err
	}
	sum, err := os.ReadFile(filepath.Join(src, "go.sum"))
	if err != nil {
		return "", err
	}
	copies := map[string]string{}
	for _, e := range t.Edits {
		if copies[e.Module] == "" {
			to := filepath.Join(dir, fmt.Sprint(len(copies)))
			if err := copyModule(ctx, src, e.Module, to); err != nil {
				return "", err
			}
			copies[e.Module] = to
			mod = fmt.Appendf(mod, "\nreplace %s => %s\n", e.Module, to)
		}
		if err := e.apply(copies[e.Module]); err != nil {
			return "", err
		}
	}
	modfile = filepath.Join(dir, "go.mod")
	return modfile, errors.Join(os.WriteFile(modfile, mod, 0o644), os.WriteFile(filepath.Join(dir, "go.sum"), sum, 0o644))
}

// apply makes the edit in the module's copy.
func (e Edit) apply(dir string) error {
	file := filepath.Join(dir, e.File)
	b, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("edit %s: %w", e.Module, err)
	}
	if n := strings.Count(string(b), e.Old); n != 1 {
		return fmt.Errorf("edit %s: %s has %q %d times; want once", e.Module, e.File, e.Old, n)
	}
	return os.WriteFile(file, []byte(strings.Replace(string(b), e.Old, e.New, 1)), 0o644)
}

// copyModule copies the version of a module that the go.mod in src asks for.
func copyModule(ctx context.Context, src, module, to string) error {
	cmd := exec.CommandContext(ctx, "go", "mod", "download", "-json", module)
	cmd.Dir = src
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=")
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("download module %s: %w: %s", module, err, out)
	}
	var m struct{ Dir string }
	if err := json.Unmarshal(out, &m); err != nil {
		return fmt.Errorf("download module %s: %w", module, err)
	}
	if err := os.CopyFS(to, os.DirFS(m.Dir)); err != nil {
		return fmt.Errorf("copy module %s: %w", module, err)
	}
	return nil
}
