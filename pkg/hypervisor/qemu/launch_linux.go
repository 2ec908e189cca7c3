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

func launch(ctx context.Context, cfg Config, spec *hypervisor.Spec) (hypervisor.VM, error) {
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
