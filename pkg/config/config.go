// Package config reads the runtime's configuration: one TOML file, whose keys
// docs/configuration.md describes. Everything has a default, so no file is
// needed.
//
// A Config is checked once, by Load or Parse, and plain data from then on. What
// its paths name is looked up by the methods, each time anew, since it may be
// installed later. All of it may be used from any goroutine. A file that
// changes is not noticed: each shim reads it once, when it starts.
package config

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/pkg/hypervisor"
)

const (
	// DefaultPath is read when neither the caller nor the environment names a
	// file. It alone may be absent.
	DefaultPath = "/etc/vmrt/config.toml"
	// PathEnv is the environment variable that names a file.
	PathEnv = "VMRT_CONFIG"
	// maxFile bounds what is read, in bytes.
	maxFile = 1 << 20
)

// The values of Config.Kernel beside guest.Tuned and guest.Stock, and those of
// Config.Vsock.
const (
	KernelAuto     = "auto"
	VsockAuto      = "auto"
	VsockVhost     = "vhost"
	VsockVhostUser = "vhost-user"
)

// Config is the configuration.
type Config struct {
	// File is what was read; empty when there are only defaults.
	File string
	// Accelerator is hypervisor.Auto, KVM or TCG.
	Accelerator hypervisor.Accelerator
	// Vsock is VsockAuto, VsockVhost or VsockVhostUser.
	Vsock string
	// Kernel is KernelAuto, guest.Tuned or guest.Stock.
	Kernel string
	// GuestDir, QEMU, Virtiofsd and Passt are absolute paths, or empty: to be found.
	GuestDir, QEMU, Virtiofsd, Passt string
	// MemoryMiB and CPUs size a virtual machine.
	MemoryMiB, CPUs int
	// LateInterfaces is how many network interfaces may arrive after the boot,
	// in a network namespace that is new then.
	LateInterfaces int
	// BootTimeout bounds the time from the VMM's start until the agent answers.
	BootTimeout time.Duration
	// StateDir holds the state of running sandboxes; absolute.
	StateDir string
}

// defaults returns the configuration that no file changes.
func defaults() *Config {
	return &Config{
		Accelerator:    hypervisor.Auto,
		Vsock:          VsockAuto,
		Kernel:         KernelAuto,
		MemoryMiB:      256,
		CPUs:           1,
		LateInterfaces: 1,
		BootTimeout:    30 * time.Second,
		StateDir:       "/run/vmrt",
	}
}

// Load reads the file at explicitPath; when that is empty the one that
// $VMRT_CONFIG names, and else DefaultPath.
func Load(explicitPath string) (*Config, error) {
	return load(explicitPath, os.Getenv(PathEnv), DefaultPath)
}

func load(explicit, env, fallback string) (*Config, error) {
	name := explicit
	if name == "" {
		name = env
	}
	optional := name == ""
	if optional {
		name = fallback
	}
	b, err := readFile(name)
	if optional && errors.Is(err, os.ErrNotExist) {
		return defaults(), nil
	}
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	return Parse(name, b)
}

func readFile(name string) ([]byte, error) {
	// Opening a FIFO would wait for its writer.
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || st.Mode()&os.ModeNamedPipe != 0 {
		return nil, cmp.Or(err, fmt.Errorf("%s is a FIFO; want a file", name))
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("%s: more than %d MiB", name, maxFile>>20)
	}
	return b, err
}

// validate returns everything that is wrong, one error for each key.
func (c *Config) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	oneOf := func(key, value string, want ...string) {
		if !slices.Contains(want, value) {
			bad("%s = %q: want one of %s", key, value, strings.Join(want, ", "))
		}
	}
	oneOf("accelerator", string(c.Accelerator), string(hypervisor.Auto), string(hypervisor.KVM), string(hypervisor.TCG))
	oneOf("vsock", c.Vsock, VsockAuto, VsockVhost, VsockVhostUser)
	oneOf("kernel", c.Kernel, KernelAuto, guest.Tuned, guest.Stock)
	for _, p := range []struct {
		key, value string
		required   bool
	}{
		{"guest_dir", c.GuestDir, false}, {"qemu", c.QEMU, false}, {"virtiofsd", c.Virtiofsd, false}, {"passt", c.Passt, false}, {"state_dir", c.StateDir, true},
	} {
		if !filepath.IsAbs(p.value) && (p.value != "" || p.required) {
			bad("%s = %q: want an absolute path", p.key, p.value)
		}
	}
	if c.MemoryMiB < 64 || c.MemoryMiB > 1<<24 {
		bad("memory_mib = %d: want 64 to %d", c.MemoryMiB, 1<<24)
	}
	if c.CPUs < 1 || c.CPUs > hypervisor.MaxCPUs {
		bad("cpus = %d: want 1 to %d", c.CPUs, hypervisor.MaxCPUs)
	}
	if c.LateInterfaces < 0 || c.LateInterfaces > 8 {
		bad("late_interfaces = %d: want 0 to 8", c.LateInterfaces)
	}
	if c.BootTimeout < time.Second || c.BootTimeout > time.Hour {
		bad("boot_timeout = %q: want 1s to 1h", c.BootTimeout)
	}
	return errors.Join(errs...)
}
