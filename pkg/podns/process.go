//go:build linux

package podns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/thread"
)

// Process is a child process that is watched through its pidfd: no thread
// waits for it, and no signal reaches another process that got its pid.
type Process struct {
	pid    int
	done   chan struct{}
	status unix.WaitStatus // set before done is closed

	mu    sync.Mutex
	pidfd int      // -1 once the process was reaped
	file  *os.File // owns pidfd and waits on it
}

// StartProcess starts cmd as Start does and reaps it when it ends. The caller
// must not call cmd.Wait; cmd's stdio must be nil or *os.File, because nobody
// copies. Where another part of the program reaps every child (wait4 of -1) the
// end is still noticed, with an unknown Status.
func (n *Namespaces) StartProcess(cmd *exec.Cmd) (*Process, error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	fd := -1
	cmd.SysProcAttr.PidFD = &fd
	if err := n.Start(cmd); err != nil {
		return nil, err
	}
	p := &Process{pid: cmd.Process.Pid, done: make(chan struct{})}
	if err := p.watch(fd); err != nil {
		cmd.Process.Kill()
		cmd.Wait()
		return nil, fmt.Errorf("watch process %d: %w", p.pid, err)
	}
	cmd.Process.Release()
	return p, nil
}

// watch takes pidfd over and reaps the process when it ends.
func (p *Process) watch(pidfd int) error {
	if pidfd < 0 {
		return fmt.Errorf("pidfd: %w", errors.ErrUnsupported)
	}
	// Non-blocking: os.NewFile then leaves the waiting to Go's poller.
	if err := unix.SetNonblock(pidfd, true); err != nil {
		unix.Close(pidfd)
		return err
	}
	p.pidfd = pidfd
	p.file = os.NewFile(uintptr(pidfd), "pidfd")
	conn, err := p.file.SyscallConn()
	if err != nil {
		p.file.Close()
		return err
	}
	go func() {
		// The file stays open until here, so Read has no error of its own.
		_ = conn.Read(func(fd uintptr) bool { return p.ended(int(fd)) })
		p.reap()
	}()
	return nil
}

// ended reports whether the process is a zombie or was reaped by another.
func (p *Process) ended(pidfd int) bool {
	var info unix.Siginfo
	err := retry(func() error {
		return unix.Waitid(unix.P_PIDFD, pidfd, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	})
	return err != nil || info.Signo != 0
}

func (p *Process) reap() {
	p.mu.Lock()
	_ = retry(func() error {
		_, err := unix.Wait4(p.pid, &p.status, unix.WNOHANG, nil)
		return err
	})
	p.file.Close()
	p.pidfd = -1
	p.mu.Unlock()
	close(p.done)
}

// Pid returns the process's id on the host. After Done it may belong to
// another process.
func (p *Process) Pid() int { return p.pid }

// Done is closed when the process has ended and was reaped.
func (p *Process) Done() <-chan struct{} { return p.done }

// Status says how the process ended. Zero before Done.
func (p *Process) Status() unix.WaitStatus {
	select {
	case <-p.done:
		return p.status
	default:
		return 0
	}
}

// Signal sends sig. The error is os.ErrProcessDone once the process has ended.
func (p *Process) Signal(sig unix.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pidfd < 0 {
		return os.ErrProcessDone
	}
	err := unix.PidfdSendSignal(p.pidfd, sig, nil, 0)
	if errors.Is(err, unix.ESRCH) {
		return os.ErrProcessDone
	}
	return err
}

// Kill sends SIGKILL and waits until the process was reaped. Idempotent.
func (p *Process) Kill() {
	// SIGKILL to a child fails only when it has ended already.
	_ = p.Signal(unix.SIGKILL)
	<-p.done
}

// InMounts runs f on a thread of its own that has entered the process's mount
// namespace, and returns f's error. The thread ends with f: f may change its
// root, its working directory and its namespaces. The error is
// os.ErrProcessDone once the process has ended.
func (p *Process) InMounts(f func() error) error {
	pidfd, err := p.dup()
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	return thread.Run(func() error {
		// setns(2) wants a working directory and root of the thread's own.
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			// By pidfd (Linux 5.8), so that it cannot be another process.
			err = unix.Setns(pidfd, unix.CLONE_NEWNS)
		}
		if err != nil {
			return fmt.Errorf("enter mount namespace of process %d: %w", p.pid, err)
		}
		return f()
	})
}

func (p *Process) dup() (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pidfd < 0 {
		return -1, os.ErrProcessDone
	}
	return unix.FcntlInt(uintptr(p.pidfd), unix.F_DUPFD_CLOEXEC, 0)
}

// retry calls f until it is not interrupted.
func retry(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
