package guest_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmrt/vmrt/guest"
)

func TestLoadRefuses(t *testing.T) {
	for _, tc := range []struct{ name, content, want string }{
		{"not JSON", "kernel: tuned", "invalid character"},
		{"empty", "{}", "no kernel"},
		{"huge", strings.Repeat(" ", 1<<20), "want at most"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, guest.ManifestFile)
			if err := os.WriteFile(file, []byte(tc.content), 0o644); err != nil {
				t.Fatal(err)
			}
			_, err := guest.Load(dir)
			if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), file) {
				t.Errorf("Load = %v; want an error with %q and the file", err, tc.want)
			}
		})
	}
	if _, err := guest.Load(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Load of an empty folder = %v; want os.ErrNotExist", err)
	}
}
