// Package check finds out whether this machine can run virtual machines for
// vmrt, and with what: the same look-ups that the shim makes, one result for
// each, none hiding another.
package check

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/vmrt/vmrt/pkg/config"
	"github.com/vmrt/vmrt/pkg/hypervisor/accel"
	"github.com/vmrt/vmrt/pkg/hypervisor/qemu"
	"github.com/vmrt/vmrt/pkg/vsock"
)

// ShimBinary is the name that containerd derives from the runtime's.
const ShimBinary = "containerd-shim-vmrt-v2"

// Result is one finding.
type Result struct {
	// Name says what was looked at.
	Name string
	// Found is what there is; Err says why it cannot be used and what to do.
	Found string
	Err   error
}

// Run makes every check with the configuration at path (see config.Load).
func Run(ctx context.Context, path string) []Result {
	settings, err := config.Load(path)
	if err != nil {
		return []Result{{Name: "configuration", Err: err}}
	}
	file := settings.File
	if file == "" {
		file = "defaults"
	}
	return []Result{
		{Name: "configuration", Found: file},
		root(),
		shim(),
		qemuBinary(ctx, settings),
		virtiofsd(settings),
		passt(settings),
		guestFiles(settings),
		accelerator(ctx, settings),
		transport(settings),
	}
}

func root() Result {
	r := Result{Name: "user", Found: fmt.Sprintf("uid %d", os.Geteuid())}
	if os.Geteuid() != 0 {
		r.Err = fmt.Errorf("uid %d: the runtime needs root", os.Geteuid())
	}
	return r
}

// shim looks beside this binary: containerd finds the shim in its own PATH or
// by an absolute path, which cannot be known here.
func shim() Result {
	self, err := os.Executable()
	if err != nil {
		return Result{Name: "shim", Err: err}
	}
	path := filepath.Join(filepath.Dir(self), ShimBinary)
	if _, err := os.Stat(path); err != nil {
		return Result{Name: "shim", Err: fmt.Errorf("%w: install it beside vmrtctl, in containerd's PATH", err)}
	}
	return Result{Name: "shim", Found: path}
}

// qemuBinary also runs it for its version.
func qemuBinary(ctx context.Context, settings *config.Config) Result {
	path, err := settings.FindQEMU()
	if err != nil {
		return Result{Name: "qemu", Err: err}
	}
	b, err := qemu.Identify(ctx, path, "")
	return Result{Name: "qemu", Found: fmt.Sprintf("%s, version %v", path, b.Version), Err: err}
}

func virtiofsd(settings *config.Config) Result {
	path, err := settings.FindVirtiofsd()
	return Result{Name: "virtiofsd", Found: path, Err: err}
}

// passt need not be there.
func passt(settings *config.Config) Result {
	path, err := settings.FindPasst()
	if err != nil && settings.Passt == "" {
		return Result{Name: "passt", Found: "none: no pods with the host's network"}
	}
	return Result{Name: "passt", Found: path, Err: err}
}

func guestFiles(settings *config.Config) Result {
	g, err := settings.Guest()
	if err != nil {
		return Result{Name: "guest", Err: err}
	}
	return Result{Name: "guest", Found: fmt.Sprintf("%s kernel, %s", g.Kind, g.Kernel)}
}

func accelerator(ctx context.Context, settings *config.Config) Result {
	v, err := accel.Choose(ctx, settings.Accelerator, accel.Config{})
	if err != nil {
		return Result{Name: "accelerator", Err: err}
	}
	return Result{Name: "accelerator", Found: fmt.Sprintf("%s: %s", v.Accelerator, v.Reason)}
}

func transport(settings *config.Config) Result {
	t, err := vsock.Open(settings.Vsock)
	if err != nil {
		return Result{Name: "vsock", Err: err}
	}
	defer t.Close()
	return Result{Name: "vsock", Found: t.Name()}
}
