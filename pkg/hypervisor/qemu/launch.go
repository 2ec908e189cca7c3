package qemu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"os/exec"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/hypervisor"
)

// environment is all that QEMU needs of one. Messages are parsed by people, in
// any locale; by tests in none.
var environment = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}

// Config says how QEMU is run.
type Config struct {
	// Binary is the path of qemu-system-x86_64, or a name to look up in PATH.
	Binary string
	// Start starts the prepared command; nil is (*exec.Cmd).Start. QEMU gets
	// SIGKILL when the thread that forked it ends, so the caller must keep
	// that thread locked for as long as the machine shall live.
	Start hypervisor.StartFunc
	// Credential is who QEMU runs as; nil is the caller. Kernel and initrd
	// must be readable to it, but not the folders above them. Under KVM it
	// is given /dev/kvm by QEMU 9.0 and newer; for older ones the device's
	// group is added to Credential if that suffices.
	Credential *syscall.Credential
	// Console is called with each line of the guest's console, one call at a
	// time. Lines are printable and bounded; they are the guest's words. It
	// must return soon: the machine is not Done before. May be nil.
	Console func(line string)
	// Log is told what happens to the machine. May be nil.
	Log *slog.Logger
	// CacheDir keeps what was found out about the binary and the host; ""
	// is hypervisor.DefaultCacheDir. Only the caller's user may write there.
	CacheDir string
}

// Launch starts a virtual machine and returns once its process runs, without
// waiting for the guest or for QEMU's own start-up: a QEMU that ends at once is
// seen by Done and Err. ctx bounds Launch and not the machine. When it returns
// an error, nothing is left running and no descriptor open.
//
// QEMU inherits duplicates of the spec's descriptors and nothing else: Launch
// marks every descriptor of the calling process close-on-exec first, also those
// that this process itself had inherited.
func Launch(ctx context.Context, cfg Config, spec hypervisor.Spec) (hypervisor.VM, error) {
	vm, err := launch(ctx, cfg, &spec)
	if err != nil {
		return nil, fmt.Errorf("start vm %s: %w", spec.Name, err)
	}
	return vm, nil
}

func launch(ctx context.Context, cfg Config, spec *hypervisor.Spec) (*VM, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Log = cfg.Log.With("vm", spec.Name)
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	binary, h, err := identify(ctx, cfg, spec)
	if err != nil {
		return nil, err
	}
	passKVM := spec.Accelerator == hypervisor.KVM && binary.takesKVM()
	if spec.Accelerator == hypervisor.KVM && !passKVM {
		if cfg.Credential, err = kvmCredential(cfg.Credential); err != nil {
			return nil, err
		}
	}
	var ends endpoints
	if err := ends.open(spec, passKVM); err != nil {
		return nil, err
	}
	defer ends.closeChild()
	args, inherited, err := commandLine(binary, h, spec, ends.child)
	if err != nil {
		ends.closeParent()
		return nil, err
	}
	cfg.Log.Debug("starting QEMU", "binary", binary.Path, "version", binary.Version.String(), "args", args)
	cmd, pidfd, err := start(ctx, cfg, &ends, binary.Path, args, inherited)
	if err != nil {
		ends.closeParent()
		return nil, err
	}
	return supervise(cfg, spec, cmd, pidfd, ends), nil
}

// identify finds out about binary and host, at the same time: each takes 10 to
// 20 ms once a boot.
func identify(ctx context.Context, cfg Config, spec *hypervisor.Spec) (Binary, host, error) {
	hosts := make(chan host, 1)
	go func() {
		if spec.Accelerator != hypervisor.TCG {
			hosts <- host{}
			return
		}
		h, err := identifyHost(cfg.CacheDir)
		if err != nil {
			cfg.Log.Warn("the guest calibrates its clock itself, which may fail under emulation", "error", err)
		}
		hosts <- h
	}()
	binary, err := Identify(ctx, cfg.Binary, cfg.CacheDir)
	return binary, <-hosts, err
}

// start runs the command. pidfd is -1 where the kernel has none.
func start(ctx context.Context, cfg Config, ends *endpoints, path string, args []string, inherited []*os.File) (cmd *exec.Cmd, pidfd int, err error) {
	pidfd = -1
	cmd = exec.Command(path, args...)
	cmd.Dir = "/"
	cmd.Env = environment
	cmd.Stdout, cmd.Stderr = ends.childStderr, ends.childStderr
	cmd.ExtraFiles = inherited
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig:  syscall.SIGKILL,
		Credential: cfg.Credential,
		PidFD:      &pidfd,
	}
	if ctx.Err() != nil {
		return nil, -1, context.Cause(ctx)
	}
	if err := closeAllOnExec(); err != nil {
		return nil, -1, err
	}
	starter := cfg.Start
	if starter == nil {
		starter = (*exec.Cmd).Start
	}
	err = starter(cmd)
	if err == nil && cmd.Process == nil {
		err = errors.New("the start function started nothing")
	}
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		// A start function may fail after the fork.
		if cmd.Process != nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		if pidfd >= 0 {
			syscall.Close(pidfd)
		}
		return nil, -1, fmt.Errorf("start %s: %w", path, err)
	}
	return cmd, pidfd, nil
}

// closeAllOnExec keeps what this process inherited, such as the socket that a
// shim serves, from being inherited by QEMU as well.
func closeAllOnExec() error {
	err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC)
	if err == nil {
		return nil
	}
	// Before Linux 5.11.
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("list own descriptors: %w", err)
	}
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
	return nil
}
