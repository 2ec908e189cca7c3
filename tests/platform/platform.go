// Package platform says what the tests of virtual machines run on: which QEMU
// and virtiofsd, which accelerator and vsock transport. By default that is what
// the machine has and what the runtime itself would choose; variables of the
// environment, which hack/test.sh sets, choose otherwise:
//
//	VMRT_QEMU, VMRT_VIRTIOFSD  paths of programs (tests/vmm.sh)
//	VMRT_LAB                   set in the nested machine of tests/lab: KVM and vhost-vsock
//	VMRT_PROGRAMS              a folder with programs that Build need not build
//
// The functions may be called from several goroutines.
package platform

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vmrt/vmrt/hack/tools"
	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/hypervisor/accel"
)

// Lab reports whether this is the nested machine, where KVM and vhost-vsock
// must work and everything takes ten times as long.
func Lab() bool { return os.Getenv("VMRT_LAB") != "" }

// QEMU returns the path of the QEMU to test with.
func QEMU() (string, error) {
	name := os.Getenv("VMRT_QEMU")
	if name == "" {
		name = "qemu-system-x86_64"
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("find QEMU to test with: %w", err)
	}
	return path, nil
}

// Virtiofsd returns the path of the virtiofsd to test with, or else the
// machine's, which find looks for.
func Virtiofsd(find func() (string, error)) (string, error) {
	if path := os.Getenv("VMRT_VIRTIOFSD"); path != "" {
		return path, nil
	}
	return find()
}

// probes is how often the nested machine's KVM is measured. The time limit of a
// probe is made for real machines; an emulated one needs some attempts to get
// its pages in.
const probes = 20

// Accelerator returns what executes a guest here, as the runtime chooses it. In
// the nested machine anything but KVM is an error.
func Accelerator(ctx context.Context, cfg accel.Config) (hypervisor.Accelerator, error) {
	if !Lab() {
		r, err := accel.Choose(ctx, hypervisor.Auto, cfg)
		return r.Accelerator, err
	}
	var errs []error
	for range probes {
		r, err := accel.Choose(ctx, hypervisor.KVM, cfg)
		if err == nil {
			return r.Accelerator, nil
		}
		errs = append(errs, err)
		// A measurement is kept, also one that something else on the machine
		// has slowed down.
		dir := cfg.CacheDir
		if dir == "" {
			dir = hypervisor.DefaultCacheDir
		}
		if err := os.Remove(filepath.Join(dir, accel.CacheFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return "", fmt.Errorf("measure KVM in the nested machine: %w", errors.Join(errs...))
}

// Settings returns a configuration of the runtime (TOML) for this platform. own
// are lines of a test, whose keys win.
func Settings(own string) string {
	type setting struct{ key, value string }
	var all []setting
	for key, name := range map[string]string{"qemu": "VMRT_QEMU", "virtiofsd": "VMRT_VIRTIOFSD"} {
		if path := os.Getenv(name); path != "" {
			all = append(all, setting{key, path})
		}
	}
	if Lab() {
		all = append(all, setting{"accelerator", "kvm"}, setting{"vsock", "vhost"}, setting{"boot_timeout", "5m"})
	}
	slices.SortFunc(all, func(a, b setting) int { return strings.Compare(a.key, b.key) })
	var b strings.Builder
	for _, s := range all {
		if !sets(own, s.key) {
			fmt.Fprintf(&b, "%s = %q\n", s.key, s.value)
		}
	}
	return b.String() + own
}

// sets reports whether one of the lines assigns to key.
func sets(lines, key string) bool {
	for line := range strings.Lines(lines) {
		if name, _, ok := strings.Cut(line, "="); ok && strings.TrimSpace(name) == key {
			return true
		}
	}
	return false
}

// Build returns the path of a static program, that of the package in the folder
// dir below the top of the tree. It is built into the folder out, unless
// VMRT_PROGRAMS has it under the name of dir with dashes for slashes, as in the
// nested machine, where building takes minutes.
func Build(dir, out string) (string, error) {
	name := strings.ReplaceAll(dir, "/", "-")
	if built := os.Getenv("VMRT_PROGRAMS"); built != "" {
		have := filepath.Join(built, name)
		if _, err := os.Stat(have); err == nil {
			return have, nil
		}
	}
	root, err := tools.Root()
	if err != nil {
		return "", err
	}
	program := filepath.Join(out, name)
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-tags=no_grpc", "-ldflags=-s -w", "-o", program, "./"+dir)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if b, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", dir, err, b)
	}
	return program, nil
}
