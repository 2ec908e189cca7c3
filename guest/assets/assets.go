// Package assets makes the files that a virtual machine boots from (package
// guest) out of a kernel folder, the agent and an OCI runtime.
//
// The same inputs give the same bytes. Files are replaced one by one, each
// atomically, so that a virtual machine which is using the old ones is not
// disturbed; two builds into one folder at a time may leave a mixture.
package assets

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/guest/initramfs"
	"github.com/vmrt/vmrt/guest/kmod"
)

// Lists of modules in the initramfs, for the agent: absolute paths, one on a
// line, in load order.
const (
	// BootList is loaded before the agent reports.
	BootList = "lib/vmrt/modules"
	// LateList is loaded after; a module that fails to load is no error.
	LateList = "lib/vmrt/modules.late"
)

//go:embed modules.boot
var bootModules string

//go:embed modules.late
var lateModules string

// Spec says what to build from what.
type Spec struct {
	// Kind is guest.Tuned or guest.Stock.
	Kind string
	// KernelDir is a folder that kernel.sh or kernel-stock.sh made.
	KernelDir string
	// Agent and Runtime are statically linked programs.
	Agent, Runtime string
	// AgentVersion and RuntimeVersion go into the manifest as they are.
	AgentVersion, RuntimeVersion string
	// Out is the folder that gets the files. It is made if it is missing.
	Out string
}

// Build makes the guest files and returns their manifest.
func Build(s Spec) (*guest.Manifest, error) {
	if s.Kind != guest.Tuned && s.Kind != guest.Stock {
		return nil, fmt.Errorf("build guest files: kernel kind %q: want %q or %q", s.Kind, guest.Tuned, guest.Stock)
	}
	m, err := s.build()
	if err != nil {
		return nil, fmt.Errorf("build guest files in %s: %w", s.Out, err)
	}
	return m, nil
}

func (s *Spec) build() (*guest.Manifest, error) {
	release, err := line(filepath.Join(s.KernelDir, "release"))
	if err != nil {
		return nil, err
	}
	pkg, err := line(filepath.Join(s.KernelDir, "version"))
	if err != nil {
		return nil, err
	}
	kernel, err := os.ReadFile(filepath.Join(s.KernelDir, guest.KernelFile))
	if err != nil {
		return nil, err
	}
	mods, err := findModules(filepath.Join(s.KernelDir, "lib/modules", release))
	if err != nil {
		return nil, err
	}
	archive, err := s.archive(mods)
	if err != nil {
		return nil, err
	}
	m := &guest.Manifest{
		Kernel: guest.Kernel{Kind: s.Kind, Release: release, Package: pkg, SHA256: digest(kernel)},
		Initramfs: guest.Initramfs{
			SHA256:  digest(archive),
			Bytes:   int64(len(archive)),
			Modules: len(mods.boot) + len(mods.late),
		},
		Agent:   s.AgentVersion,
		Runtime: s.RuntimeVersion,
	}
	manifest, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(s.Out, 0o755); err != nil {
		return nil, err
	}
	for _, f := range []struct {
		name string
		data []byte
	}{
		{guest.KernelFile, kernel},
		{guest.InitramfsFile, archive},
		{guest.ManifestFile, append(manifest, '\n')}, // last: it describes the others
	} {
		if err := replace(filepath.Join(s.Out, f.name), f.data); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// archive returns the initramfs.
func (s *Spec) archive(mods modules) ([]byte, error) {
	agent, err := static(s.Agent)
	if err != nil {
		return nil, err
	}
	runtime, err := static(s.Runtime)
	if err != nil {
		return nil, err
	}
	var a initramfs.Archive
	err = errors.Join(
		a.Dir("dev", 0o755),
		a.Dir("etc", 0o755),
		a.Dir("proc", 0o555),
		a.Dir("run", 0o755),
		a.Dir("sys", 0o555),
		a.Dir("tmp", 0o1777),
		// The kernel opens it for init before there is any other.
		a.CharDevice("dev/console", 0o600, 5, 1),
		a.File("init", 0o755, agent),
		a.File("bin/crun", 0o755, runtime),
		mods.addTo(&a),
	)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	_, err = a.WriteTo(&b)
	return b.Bytes(), err
}

// modules are what the initramfs carries, in load order.
type modules struct{ boot, late []*kmod.Module }

// findModules looks up the modules of the two lists in dir. A kernel without
// such a folder has no modules.
func findModules(dir string) (modules, error) {
	tree, err := kmod.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return modules{}, nil
	}
	if err != nil {
		return modules{}, err
	}
	first, second := wanted(tree, bootModules), wanted(tree, lateModules)
	boot, err := tree.Resolve(first)
	if err != nil {
		return modules{}, err
	}
	// Resolving both at once leaves out of the second what the first has.
	all, err := tree.Resolve(append(first, second...))
	if err != nil {
		return modules{}, err
	}
	return modules{boot: boot, late: all[len(boot):]}, nil
}

// wanted returns the names in a list, without optional ones that tree lacks.
func wanted(tree *kmod.Tree, list string) []string {
	var names []string
	for l := range strings.Lines(list) {
		name := strings.TrimSpace(l)
		if name == "" || name[0] == '#' {
			continue
		}
		if opt, ok := strings.CutPrefix(name, "?"); ok {
			if !tree.Has(opt) {
				continue
			}
			name = opt
		}
		names = append(names, name)
	}
	return names
}

func (m modules) addTo(a *initramfs.Archive) error {
	return errors.Join(addModules(a, BootList, m.boot), addModules(a, LateList, m.late))
}

// addModules adds a list and the modules that it names.
func addModules(a *initramfs.Archive, list string, mods []*kmod.Module) error {
	if len(mods) == 0 {
		return nil
	}
	var lines strings.Builder
	for _, m := range mods {
		file := "lib/modules/" + filepath.Base(m.Path)
		if err := a.File(file, 0o644, m.Data); err != nil {
			return err
		}
		fmt.Fprintf(&lines, "/%s\n", file)
	}
	return a.File(list, 0o644, []byte(lines.String()))
}

func digest(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}
