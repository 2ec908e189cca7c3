package qemu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/hypervisor/qemu/qmp"
)

const (
	// drainTime bounds reading what QEMU left in its pipes when it ended.
	drainTime = time.Second
	// greetingTime bounds the wait for QEMU's first words on QMP: it comes
	// to them once all devices are set up.
	greetingTime = time.Minute
)

// VM is a virtual machine run by QEMU. It implements hypervisor.VM.
type VM struct {
	name string
	cmd  *exec.Cmd
	log  *slog.Logger
	// real names the guest's files in QEMU's messages, which know them by
	// descriptor.
	real *strings.Replacer

	console, stderr lines

	connected chan struct{} // closed when qmp and qmpErr are set
	qmp       *qmp.Client
	qmpErr    error

	done chan struct{}

	mu     sync.Mutex
	ended  bool   // guarded by mu; the process has ended
	killed bool   // guarded by mu; Kill came before that
	reason string // guarded by mu; QEMU's word for why the guest stopped
	err    error  // guarded by mu; set before done is closed
}

var _ hypervisor.VM = (*VM)(nil)

// supervise takes over a command that was started. It owns pidfd and the
// parent's endpoints.
func supervise(cfg Config, spec *hypervisor.Spec, cmd *exec.Cmd, pidfd int, ends endpoints) *VM {
	v := &VM{
		name:      spec.Name,
		cmd:       cmd,
		log:       cfg.Log,
		real:      strings.NewReplacer(kernelPath, spec.Kernel, initrdPath, spec.Initrd),
		connected: make(chan struct{}),
		done:      make(chan struct{}),
	}
	v.console.emit = cfg.Console
	v.stderr.emit = func(line string) { v.log.Warn("QEMU says", "line", line) }

	hurry := make(chan struct{})
	var readers sync.WaitGroup
	readers.Go(func() { v.console.read(ends.console, hurry) })
	readers.Go(func() { v.stderr.read(ends.stderr, hurry) })
	readers.Go(func() { v.followQMP(qmp.New(ends.qmp)) })
	go func() {
		waitExit(pidfd)
		err := cmd.Wait()
		v.mu.Lock()
		v.ended = true
		v.mu.Unlock()
		close(hurry)
		// Everything that QEMU wrote is in the buffers; but somebody may
		// have inherited its end of them.
		ends.setReadDeadline(time.Now().Add(drainTime))
		readers.Wait()
		ends.closeParent()
		v.finish(err)
	}()
	v.log.Info("QEMU started", "pid", v.Pid())
	return v
}

// waitExit waits until the process of pidfd has ended, without occupying a
// thread, and closes pidfd. If it cannot, it returns at once: the wait that
// follows then occupies one.
func waitExit(pidfd int) {
	if pidfd < 0 {
		return
	}
	if err := unix.SetNonblock(pidfd, true); err != nil {
		unix.Close(pidfd)
		return
	}
	f := os.NewFile(uintptr(pidfd), "pidfd")
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return
	}
	// A pidfd polls readable once the process has ended (pidfd_open(2)).
	_ = raw.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 0)
		return n != 0 || err != nil && !errors.Is(err, unix.EINTR)
	})
}

// followQMP serves VM.QMP and remembers why QEMU says that the guest stopped.
func (v *VM) followQMP(c *qmp.Client) {
	defer c.Close()
	events := c.Subscribe("SHUTDOWN", "GUEST_PANICKED")
	defer events.Close()
	ctx, cancel := context.WithTimeout(context.Background(), greetingTime)
	defer cancel()
	v.qmp, v.qmpErr = c, c.Handshake(ctx)
	close(v.connected)
	if v.qmpErr != nil {
		v.log.Debug("no QMP connection", "error", v.qmpErr)
		return
	}
	for ev := range events.Events() {
		v.note(ev)
	}
	<-c.Done()
}

// finish publishes the end of the process, which Wait reported as err.
func (v *VM) finish(err error) {
	v.mu.Lock()
	if !v.killed || !fromKill(v.cmd.ProcessState) {
		v.err = v.describe(err)
	}
	v.mu.Unlock()
	v.log.Info("QEMU ended", "status", v.cmd.ProcessState, "error", v.Err())
	close(v.done)
}

// fromKill reports whether a process may have ended by SIGKILL: one that ended
// by itself just when Kill came has a reason of its own. Nothing is known of a
// process that somebody else has reaped.
func fromKill(p *os.ProcessState) bool {
	if p == nil {
		return true
	}
	status, ok := p.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == syscall.SIGKILL
}

// describe says what the end of QEMU means. v.mu is held.
func (v *VM) describe(err error) error {
	var console string
	if said := v.console.conclusion(); said != "" {
		console = "; console: " + said
	}
	if err == nil {
		reason := v.reason
		if reason == "" {
			reason = "QEMU ended with status 0"
		}
		return fmt.Errorf("vm %s: %w: %s%s", v.name, hypervisor.ErrGuestStopped, reason, console)
	}
	var stderr string
	if said := v.stderr.conclusion(); said != "" {
		stderr = ": " + v.real.Replace(said)
	}
	return fmt.Errorf("vm %s: %s: %w%s%s", v.name, filepath.Base(v.cmd.Path), err, stderr, console)
}

// Pid implements hypervisor.VM.
func (v *VM) Pid() int { return v.cmd.Process.Pid }

// Done implements hypervisor.VM.
func (v *VM) Done() <-chan struct{} { return v.done }

// Err implements hypervisor.VM.
func (v *VM) Err() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.err
}

// Kill implements hypervisor.VM.
func (v *VM) Kill(ctx context.Context) error {
	select {
	case <-v.done:
		return nil
	default:
	}
	v.mu.Lock()
	if !v.ended {
		v.killed = true
	}
	v.mu.Unlock()
	if err := v.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill vm %s: %w", v.name, err)
	}
	select {
	case <-v.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("kill vm %s: process %d: %w", v.name, v.Pid(), context.Cause(ctx))
	}
}

// QMP returns the machine's QMP connection, waiting until QEMU has set its
// devices up, some 30 ms after its start. The connection is the machine's to
// close; it ends with it.
func (v *VM) QMP(ctx context.Context) (*qmp.Client, error) {
	select {
	case <-v.connected:
		if v.qmpErr != nil {
			return nil, fmt.Errorf("vm %s: %w", v.name, v.qmpErr)
		}
		return v.qmp, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("vm %s: QMP connection: %w", v.name, context.Cause(ctx))
	}
}

// ConsoleTail returns the last lines of the guest's console, oldest first. They
// are printable and bounded; they are the guest's words.
func (v *VM) ConsoleTail() []string { return v.console.tail() }
