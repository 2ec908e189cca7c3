// Package accel decides what executes a virtual machine's instructions: KVM, or
// QEMU's emulator (TCG).
//
// A /dev/kvm that opens proves nothing: nested in another virtual machine it
// may emulate every instruction, a thousand times slower than the processor,
// and a guest never finishes booting. So Choose runs a guest: a virtual machine
// of one page, in long mode, that executes some ten thousand instructions under
// the clock.
//
// Choose may be called from any goroutine and by many processes at once. It
// takes a few milliseconds where KVM works, about 50 where it is slow, and never
// more than HardLimit, or Patience if KVM was asked for. If the kernel does not
// give the probing thread back by then, that thread is left behind, with one
// virtual machine; nothing waits for it. A measured verdict is cached until the
// next boot, any other is not.
//
// Not guaranteed: that a VMM can use what the probe could. It may lack the
// right to open the device, or ask for a CPU feature that is not there.
package accel

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/hypervisor/hostcpu"
	"github.com/vmrt/vmrt/pkg/hypervisor/internal/bootcache"
)

const (
	// DefaultDevice is the kernel's KVM device.
	DefaultDevice = "/dev/kvm"
	// SoftLimit is when a probe decides by what it has measured so far.
	SoftLimit = 50 * time.Millisecond
	// HardLimit is when a probe that measured nothing is given up, if there
	// is TCG to go on with.
	HardLimit = 300 * time.Millisecond
	// Patience is the same when KVM was asked for and there is nothing else:
	// a host may just be busy.
	Patience = 5 * time.Second
	// slow is the speed, in nanoseconds an instruction, from which on KVM is
	// worse than TCG. Processors take below 1, also in nested machines, and
	// below 20 where the outer machine is itself emulated; TCG takes 1 to
	// 10. A kernel that emulates the guest takes 500 and more. 100 is far
	// from both.
	slow = 100
)

// Config says where to look. The zero value is right for the host.
type Config struct {
	// Device is the KVM device; "" is DefaultDevice.
	Device string
	// CacheDir keeps the verdict; "" is hypervisor.DefaultCacheDir. Only the
	// caller's user may write there.
	CacheDir string
}

// CacheFile is the name of the verdict's file in Config.CacheDir.
const CacheFile = "accel.json"

// Result is a decision and its reason.
type Result struct {
	// Accelerator is hypervisor.KVM or hypervisor.TCG.
	Accelerator hypervisor.Accelerator
	// Reason says why, for people: "KVM runs a guest at 0.4 ns an
	// instruction".
	Reason string
	// NanosPerInstruction is the speed that was measured; 0 if none was.
	NanosPerInstruction float64
	// FromCache: the measurement was made earlier since the last boot.
	FromCache bool
}

// verdict is what a probe found out. Only what was measured is cached.
type verdict struct {
	Measured            bool    `json:"measured"`
	NanosPerInstruction float64 `json:"nanos_per_instruction"`
	// err says why there is no measurement.
	err error
}

// prober measures a device and gives up after a time.
type prober func(ctx context.Context, device string, hard time.Duration) verdict

// Choose turns a wish into an accelerator. hypervisor.Auto is KVM where a guest
// runs at the processor's speed and else TCG. hypervisor.KVM is an error where
// it is not usable, which says why. hypervisor.TCG is always granted.
func Choose(ctx context.Context, wish hypervisor.Accelerator, cfg Config) (Result, error) {
	if cfg.Device == "" {
		cfg.Device = DefaultDevice
	}
	if cfg.CacheDir == "" {
		cfg.CacheDir = hypervisor.DefaultCacheDir
	}
	return choose(ctx, wish, cfg, probe)
}

func choose(ctx context.Context, wish hypervisor.Accelerator, cfg Config, probe prober) (Result, error) {
	switch wish {
	case hypervisor.TCG:
		return Result{Accelerator: hypervisor.TCG, Reason: "TCG was asked for"}, nil
	case hypervisor.KVM, hypervisor.Auto:
	default:
		return Result{}, fmt.Errorf("accelerator %q: want %q, %q or %q", wish, hypervisor.Auto, hypervisor.KVM, hypervisor.TCG)
	}
	hard := HardLimit
	if wish == hypervisor.KVM {
		hard = Patience
	}
	v, cached := look(ctx, cfg, hard, probe)
	if ctx.Err() != nil {
		return Result{}, fmt.Errorf("probe %s: %w", cfg.Device, context.Cause(ctx))
	}
	r := Result{NanosPerInstruction: v.NanosPerInstruction, FromCache: cached}
	usable := v.Measured && v.NanosPerInstruction < slow
	switch {
	case usable:
		r.Accelerator = hypervisor.KVM
		r.Reason = fmt.Sprintf("KVM runs a guest at %.2g ns an instruction", v.NanosPerInstruction)
		return r, nil
	case v.Measured:
		v.err = fmt.Errorf("%s takes %.0f ns an instruction of a guest: the kernel emulates it", cfg.Device, v.NanosPerInstruction)
	}
	if wish == hypervisor.KVM {
		return Result{}, fmt.Errorf("accelerator %q (try %q): %w", hypervisor.KVM, hypervisor.Auto, v.err)
	}
	r.Accelerator = hypervisor.TCG
	r.Reason = "KVM is not usable: " + v.err.Error()
	return r, nil
}

// look returns the cached verdict or a new one.
func look(ctx context.Context, cfg Config, hard time.Duration, probe prober) (v verdict, cached bool) {
	key, err := identity(cfg.Device)
	if err != nil {
		return verdict{err: err}, false
	}
	file := filepath.Join(cfg.CacheDir, CacheFile)
	if err := bootcache.Load(file, key, &v); err == nil && v.Measured && v.NanosPerInstruction > 0 {
		return v, true
	}
	v = probe(ctx, cfg.Device, hard)
	if v.Measured {
		// Without the cache the next caller measures again, nothing else.
		_ = bootcache.Store(file, key, v)
	}
	return v, false
}

// identity names the device and the processor. Loading the KVM module again,
// perhaps with other parameters, makes another device node; moving a virtual
// machine may give it another processor.
func identity(device string) (string, error) {
	fi, err := os.Stat(device)
	if err != nil {
		return "", err
	}
	cpu, err := hostcpu.Model()
	if err != nil {
		return "", err
	}
	node, err := nodeOf(fi)
	if err != nil {
		return "", fmt.Errorf("%s: %w", device, err)
	}
	return fmt.Sprintf("%s %s %s", device, node, cpu), nil
}
