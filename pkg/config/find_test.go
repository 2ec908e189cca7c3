package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmrt/vmrt/guest"
)

// makeGuest makes guest files of a kind in dir, without those named.
func makeGuest(t *testing.T, dir, kind string, without ...string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, kind), 0o755); err != nil {
		t.Fatal(err)
	}
files:
	for _, name := range []string{guest.KernelFile, guest.InitramfsFile, guest.ManifestFile} {
		for _, w := range without {
			if w == name {
				continue files
			}
		}
		chmod(t, filepath.Join(dir, kind, name), 0o644)
	}
}

// chmod gives a file, which it makes if need be, a mode whatever the umask.
func chmod(t *testing.T, name string, mode os.FileMode) {
	t.Helper()
	if err := errors.Join(os.WriteFile(name, nil, mode), os.Chmod(name, mode)); err != nil {
		t.Fatal(err)
	}
}

func TestGuest(t *testing.T) {
	both, stock, empty, partial, private := t.TempDir(), t.TempDir(), t.TempDir(), t.TempDir(), t.TempDir()
	makeGuest(t, both, guest.Tuned)
	makeGuest(t, both, guest.Stock)
	makeGuest(t, stock, guest.Stock)
	makeGuest(t, partial, guest.Tuned, guest.InitramfsFile)
	makeGuest(t, partial, guest.Stock)
	makeGuest(t, private, guest.Stock)
	chmod(t, filepath.Join(private, guest.Stock, guest.InitramfsFile), 0o640)

	for _, tt := range []struct {
		kernel, dir string
		want        string // the kind, or the error
	}{
		{KernelAuto, both, guest.Tuned},
		{guest.Tuned, both, guest.Tuned},
		{guest.Stock, both, guest.Stock},
		{KernelAuto, stock, guest.Stock},
		{guest.Tuned, stock, "find guest files: no tuned kernel in " + stock + ": `make build`"},
		{KernelAuto, empty, "find guest files: no tuned or stock kernel in " + empty + ": `make build`"},
		{KernelAuto, partial, "find guest files: " + partial + "/tuned/initramfs.cpio is missing or no file: `make build`"},
		{guest.Stock, partial, guest.Stock},
		{KernelAuto, private, "find guest files: " + private + "/stock/initramfs.cpio has mode 0640 and QEMU"},
	} {
		g, err := (&Config{Kernel: tt.kernel, GuestDir: tt.dir}).Guest()
		if err != nil {
			if !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("Guest(%s, %s) error = %v; want %s", tt.kernel, tt.dir, err, tt.want)
			}
			continue
		}
		want := Guest{
			Kind: tt.want, Kernel: filepath.Join(tt.dir, tt.want, "vmlinux"),
			Initrd: filepath.Join(tt.dir, tt.want, "initramfs.cpio"), Manifest: filepath.Join(tt.dir, tt.want, "guest.json"),
			CmdlineDevices: tt.want == guest.Tuned,
		}
		if diff := cmp.Diff(want, g); diff != "" {
			t.Errorf("Guest(%s, %s) (-want +got):\n%s", tt.kernel, tt.dir, diff)
		}
	}
}

func TestGuestDirs(t *testing.T) {
	want := []string{"/usr/local/bin/guest", "/usr/local/lib/vmrt/guest"}
	if diff := cmp.Diff(want, guestDirs("/usr/local/bin/containerd-shim-vmrt-v2")); diff != "" {
		t.Errorf("guestDirs() (-want +got):\n%s", diff)
	}
	// A later place counts when an earlier one has nothing, whatever the kind.
	first, second := t.TempDir(), t.TempDir()
	makeGuest(t, first, guest.Stock)
	makeGuest(t, second, guest.Tuned)
	if g, err := findGuest(KernelAuto, []string{first, second}); err != nil || g.Kind != guest.Tuned {
		t.Errorf("findGuest() = %+v, %v; want the tuned kernel of the second place", g, err)
	}
}

func TestFind(t *testing.T) {
	dir := t.TempDir()
	program := func(name string, mode os.FileMode) string {
		t.Helper()
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, nil, mode); err != nil {
			t.Fatal(err)
		}
		return name
	}
	inPath, place, plain := program("bin/inpath", 0o755), program("libexec/place", 0o755), program("plain", 0o644)
	t.Setenv("PATH", filepath.Dir(inPath))
	for _, tt := range []struct {
		name       string
		configured string
		program    string
		places     []string
		want       string
	}{
		{"configured", place, "inpath", nil, place},
		{"in $PATH", "", "inpath", []string{place}, inPath},
		{"at its place", "", "absent", []string{plain, place}, place},
		{"configured, absent", dir + "/absent", "inpath", nil,
			`find inpath: exec: "` + dir + `/absent": stat ` + dir + `/absent: no such file or directory, which the key k names`},
		{"configured, not executable", plain, "inpath", nil,
			`find inpath: exec: "` + plain + `": permission denied, which the key k names`},
		{"nowhere", "", "absent", []string{"/no/1", "/no/2"},
			"find absent: neither in $PATH nor at /no/1, /no/2: install it, or set the key k to its path"},
	} {
		got, err := find("k", tt.configured, tt.program, tt.places)
		if err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("%s: find() = %s; want %s", tt.name, got, tt.want)
		}
	}
	if got, err := (&Config{QEMU: place, Virtiofsd: inPath}).FindQEMU(); got != place || err != nil {
		t.Errorf("FindQEMU() = %s, %v; want %s", got, err, place)
	}
	if got, err := (&Config{QEMU: place, Virtiofsd: inPath}).FindVirtiofsd(); got != inPath || err != nil {
		t.Errorf("FindVirtiofsd() = %s, %v; want %s", got, err, inPath)
	}
}
