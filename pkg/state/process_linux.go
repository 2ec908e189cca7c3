package state

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Process names a process so that another that has its pid later is not taken
// for it. The zero value names none.
type Process struct {
	Pid int `json:"pid"`
	// StartTime is in clock ticks since boot (proc_pid_stat(5), field 22).
	StartTime uint64 `json:"startTime"`
}

// Find returns the process that has this pid now. It is errdefs.ErrNotFound
// when there is none.
func Find(pid int) (Process, error) {
	if pid <= 0 {
		return Process{}, fmt.Errorf("process %d: %w", pid, errdefs.ErrNotFound)
	}
	st, err := stat(pid)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return Process{}, fmt.Errorf("process %d: %w", pid, errdefs.ErrNotFound)
	}
	if err != nil {
		return Process{}, fmt.Errorf("process %d: %w", pid, err)
	}
	return Process{Pid: pid, StartTime: st.start}, nil
}

// Alive reports whether the process runs. One that is ending, and a zombie, does
// not; what it had may be in use a little longer, until Wait returns.
func (p Process) Alive() bool {
	if p.Pid <= 0 {
		return false
	}
	st, err := stat(p.Pid)
	return err == nil && st.start == p.StartTime && st.status != 'Z' && st.status != 'X' && st.flags&exiting == 0
}

// exiting is PF_EXITING (linux/sched.h): the process has begun to end. When its
// peers see the ends of its connections, all of its threads have.
const exiting = 4

// Kill sends SIGKILL to this very process, and never to another that has its
// pid now. Nil when it is gone.
func (p Process) Kill() error {
	fd, err := p.open()
	if err != nil || fd < 0 {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.Pid, err)
	}
	return nil
}

// Wait returns once the process has ended with all of its threads, which close
// its files at the latest, or with ctx's error. Nil when it is gone.
func (p Process) Wait(ctx context.Context) error {
	fd, err := p.open()
	if err != nil || fd < 0 {
		return err
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	defer f.Close()
	conn, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("wait for process %d: %w", p.Pid, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	// A pidfd becomes readable when its process ends (pidfd_open(2)).
	if err := conn.Read(func(fd uintptr) bool { return readable(int(fd)) }); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("wait for process %d: %w", p.Pid, err)
	}
	return nil
}

// open returns a non-blocking pidfd of this very process, or -1 when it is gone.
func (p Process) open() (int, error) {
	if p.Pid <= 0 {
		return -1, nil
	}
	fd, err := unix.PidfdOpen(p.Pid, 0)
	// EINVAL, in older kernels, and ENOENT: the number still names a session or
	// a group of processes, and no process (kernel/fork.c, pidfd_prepare).
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return -1, nil
	}
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", p.Pid, err)
	}
	// Only now, as the pid cannot go to another process any more unnoticed.
	if st, err := stat(p.Pid); err != nil || st.start != p.StartTime {
		unix.Close(fd)
		return -1, nil
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("open process %d: %w", p.Pid, err)
	}
	return fd, nil
}

func readable(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return n > 0 && err == nil
}

// status is part of /proc/<pid>/stat.
type status struct {
	start  uint64 // field 22
	status byte   // field 3
	flags  uint64 // field 9: PF_* of linux/sched.h, of the first thread
}

func stat(pid int) (status, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return status{}, err
	}
	return parseStat(b)
}

// parseStat reads /proc/<pid>/stat. The second field is the command's name, in
// which there may be anything, in parentheses.
func parseStat(b []byte) (status, error) {
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 20 {
		return status{}, fmt.Errorf("stat %q: too short", b)
	}
	start, err := strconv.ParseUint(string(fields[19]), 10, 64)
	flags, flagsErr := strconv.ParseUint(string(fields[6]), 10, 64)
	if err := errors.Join(err, flagsErr); err != nil {
		return status{}, fmt.Errorf("stat %q: %w", b, err)
	}
	return status{start: start, status: fields[0][0], flags: flags}, nil
}
