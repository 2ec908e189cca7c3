// Package guest describes the files that a virtual machine boots from: a
// kernel, an initramfs with the agent and the OCI runtime in it, and a
// manifest which says what they are. Package assets makes them; this package
// only reads the manifest, and its functions may be called from any goroutine.
//
// A manifest is a description for people and logs. It is not a signature:
// nothing here checks that the files are the ones that it was written for.
package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Names of the files within a folder of guest files.
const (
	KernelFile    = "vmlinux"
	InitramfsFile = "initramfs.cpio"
	ManifestFile  = "guest.json"
)

// Kinds of kernel.
const (
	// Tuned is the project's own configuration of Linux, without modules.
	Tuned = "tuned"
	// Stock is a distribution's kernel, its modules in the initramfs.
	Stock = "stock"
)

// CmdlineDevices reports whether kernels of a kind take virtio-mmio devices from
// their command line. Distributions leave that out.
func CmdlineDevices(kind string) bool { return kind == Tuned }

// Manifest describes one folder of guest files.
type Manifest struct {
	Kernel    Kernel    `json:"kernel"`
	Initramfs Initramfs `json:"initramfs"`
	// Agent is the version of vm-agent in the initramfs.
	Agent string `json:"agent"`
	// Runtime is the OCI runtime in the initramfs, name and version.
	Runtime string `json:"runtime"`
}

// Kernel describes a kernel.
type Kernel struct {
	// Kind is Tuned or Stock.
	Kind string `json:"kind"`
	// Release is what uname -r says in the guest.
	Release string `json:"release"`
	// Package is the version of the source or binary package that it is from.
	Package string `json:"package"`
	SHA256  string `json:"sha256"`
}

// Initramfs describes an initramfs.
type Initramfs struct {
	SHA256 string `json:"sha256"`
	Bytes  int64  `json:"bytes"`
	// Modules counts the kernel modules.
	Modules int `json:"modules"`
}

// maxManifest bounds what Load reads.
const maxManifest = 64 << 10

// Load reads the manifest in the folder dir.
func Load(dir string) (*Manifest, error) {
	file := filepath.Join(dir, ManifestFile)
	info, err := os.Stat(file)
	if err != nil {
		return nil, fmt.Errorf("read guest manifest: %w", err)
	}
	if info.Size() > maxManifest {
		return nil, fmt.Errorf("read guest manifest %s: %d bytes, want at most %d", file, info.Size(), maxManifest)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read guest manifest: %w", err)
	}
	var m Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("read guest manifest %s: %w", file, err)
	}
	if m.Kernel.Kind == "" || m.Kernel.Release == "" {
		return nil, fmt.Errorf("read guest manifest %s: %w", file, errors.New("no kernel in it"))
	}
	return &m, nil
}

// String says in one line what boots: "tuned kernel 6.12.1, agent 0.1".
func (m *Manifest) String() string {
	return fmt.Sprintf("%s kernel %s (%s), agent %s, %s",
		m.Kernel.Kind, m.Kernel.Release, m.Kernel.Package, m.Agent, m.Runtime)
}
