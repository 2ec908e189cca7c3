package image

import (
	"debug/elf"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestOCI(t *testing.T) {
	one, two := NewLayer().File("a", 0o644, []byte("one")), NewLayer().File("a", 0o644, []byte("two"))
	s, err := Image{Name: "x/y:1", Layers: []*Layer{one, two}}.OCI()
	if err != nil {
		t.Fatal(err)
	}
	if want := Digest(s.Manifest); s.Digest != want {
		t.Errorf("digest = %s; want %s", s.Digest, want)
	}
	var m struct {
		MediaType string
		Config    descriptor
		Layers    []descriptor
	}
	if err := json.Unmarshal(s.Manifest, &m); err != nil {
		t.Fatal(err)
	}
	if m.MediaType != MediaTypeManifest || len(m.Layers) != 2 || len(s.Blobs) != 3 {
		t.Errorf("manifest of type %s with %d layers, %d blobs; want %s, 2, 3", m.MediaType, len(m.Layers), len(s.Blobs), MediaTypeManifest)
	}
	for _, d := range append(m.Layers, m.Config) {
		if b := s.Blobs[d.Digest]; len(b) != d.Size || Digest(b) != d.Digest {
			t.Errorf("blob %s has %d bytes and digest %s; want %d bytes", d.Digest, len(b), Digest(b), d.Size)
		}
	}
}

// A program with its libraries and nothing else runs.
func TestLibraries(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, for chroot")
	}
	cat, err := exec.LookPath("cat")
	if err != nil {
		t.Fatal(err)
	}
	libs, err := libraries(cat, cat)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, file := range append(libs, cat) {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(dir, file)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("chroot", dir, cat, "/nowhere").CombinedOutput(); !strings.Contains(string(out), "/nowhere: No such file") {
		t.Errorf("cat in a root of its own says %q, %v; want that it finds no file", out, err)
	}
	if _, err := libraries("/etc/passwd"); err == nil {
		t.Error("libraries(/etc/passwd) = nil error; want one")
	}
}

// The programs need no library.
func TestProgram(t *testing.T) {
	b, err := Program(t.Context(), "euid")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "euid")
	if err := os.WriteFile(file, b, 0o755); err != nil {
		t.Fatal(err)
	}
	if libs, err := libraries(file); err != nil || len(libs) > 0 {
		t.Errorf("libraries(euid) = %q, %v; want none", libs, err)
	}
	if f, err := elf.Open(file); err != nil || f.Section(".symtab") != nil {
		t.Errorf("elf.Open(euid) = %v; want no symbols", err)
	}
	if _, err := Program(t.Context(), "absent"); err == nil || !strings.Contains(err.Error(), "build program absent: ") {
		t.Errorf("Program(absent) = %v; want an error that names it", err)
	}
}
