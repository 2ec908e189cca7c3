package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/vmrt/vmrt/guest"
)

// Guest is one set of guest files. All paths are absolute.
type Guest struct {
	// Kind is guest.Tuned or guest.Stock.
	Kind string
	// Kernel, Initrd and Manifest are files that exist.
	Kernel, Initrd, Manifest string
	// CmdlineDevices: the kernel takes devices from its command line.
	CmdlineDevices bool
}

// Guest finds the guest files that Kernel and GuestDir choose. With KernelAuto
// the tuned kernel is preferred.
func (c *Config) Guest() (Guest, error) {
	dirs := []string{c.GuestDir}
	if c.GuestDir == "" {
		self, err := os.Executable()
		if err != nil {
			return Guest{}, fmt.Errorf("find guest files: %w", err)
		}
		dirs = guestDirs(self)
	}
	return findGuest(c.Kernel, dirs)
}

// guestDirs are the places of the guest files for the program self: beside it,
// as in a build, and where packages install them.
func guestDirs(self string) []string {
	bin := filepath.Dir(self)
	return []string{filepath.Join(bin, "guest"), filepath.Join(bin, "../lib/vmrt/guest")}
}

func findGuest(kernel string, dirs []string) (Guest, error) {
	kinds := []string{kernel}
	if kernel == KernelAuto {
		kinds = []string{guest.Tuned, guest.Stock}
	}
	for _, kind := range kinds {
		for _, dir := range dirs {
			g, err := guestIn(filepath.Join(dir, kind), kind)
			if err == nil || !errors.Is(err, fs.ErrNotExist) {
				return g, err
			}
		}
	}
	return Guest{}, fmt.Errorf("find guest files: no %s kernel in %s: `make build` makes the stock one and `make kernel` the tuned one; the key guest_dir says where they are",
		strings.Join(kinds, " or "), strings.Join(dirs, " or "))
}

// guestIn returns the guest files in dir. It is fs.ErrNotExist when there is
// no such folder, and another error when a file is missing in it.
func guestIn(dir, kind string) (Guest, error) {
	if _, err := os.Stat(dir); err != nil {
		return Guest{}, fmt.Errorf("find guest files: %w", err)
	}
	g := Guest{
		Kind:     kind,
		Kernel:   filepath.Join(dir, guest.KernelFile),
		Initrd:   filepath.Join(dir, guest.InitramfsFile),
		Manifest: filepath.Join(dir, guest.ManifestFile),

		CmdlineDevices: guest.CmdlineDevices(kind),
	}
	for _, name := range []string{g.Kernel, g.Initrd, g.Manifest} {
		st, err := os.Stat(name)
		switch {
		case err != nil || !st.Mode().IsRegular():
			return Guest{}, fmt.Errorf("find guest files: %s is missing or no file: `make build` makes it", name)
		case st.Mode()&0o004 == 0 && name != g.Manifest:
			// It is opened by us, and by QEMU once more through our
			// descriptor: the folders above do not matter.
			return Guest{}, fmt.Errorf("find guest files: %s has mode %#o and QEMU, which runs as another user, cannot read it: `chmod a+r` it", name, st.Mode().Perm())
		}
	}
	return g, nil
}

// machines are QEMU's names of Go's architectures.
var machines = map[string]string{"amd64": "x86_64", "arm64": "aarch64"}

// FindQEMU returns the path of QEMU.
func (c *Config) FindQEMU() (string, error) {
	name := "qemu-system-" + machines[runtime.GOARCH]
	return find("qemu", c.QEMU, name, []string{"/usr/bin/" + name})
}

// virtiofsdPlaces are where distributions put virtiofsd, which is not for users
// to run: Debian 13 and Fedora, Debian 12, Arch, Alpine.
var virtiofsdPlaces = []string{"/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/virtiofsd/virtiofsd"}

// FindVirtiofsd returns the path of virtiofsd.
func (c *Config) FindVirtiofsd() (string, error) {
	return find("virtiofsd", c.Virtiofsd, "virtiofsd", virtiofsdPlaces)
}

// FindPasst returns the path of passt, which only pods with the host's network
// need.
func (c *Config) FindPasst() (string, error) {
	return find("passt", c.Passt, "passt", []string{"/usr/bin/passt"})
}

// find returns configured when that is set, and else the program called name:
// in $PATH or the first of places that has it.
func find(key, configured, name string, places []string) (string, error) {
	if configured != "" {
		if _, err := exec.LookPath(configured); err != nil {
			return "", fmt.Errorf("find %s: %w, which the key %s names", name, err, key)
		}
		return configured, nil
	}
	// Not one in the current folder, which is anybody's.
	if path, err := exec.LookPath(name); err == nil && filepath.IsAbs(path) {
		return path, nil
	}
	i := slices.IndexFunc(places, func(p string) bool { _, err := exec.LookPath(p); return err == nil })
	if i < 0 {
		return "", fmt.Errorf("find %s: neither in $PATH nor at %s: install it, or set the key %s to its path", name, strings.Join(places, ", "), key)
	}
	return places[i], nil
}
