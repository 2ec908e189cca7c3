package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// place is the cgroup in one hierarchy.
type place struct {
	hierarchy
	// dir is its folder.
	dir string
}

// make makes the folder and those above it, ready to take processes.
func (p place) make() error {
	dir := p.root
	rel, err := filepath.Rel(p.root, p.dir)
	if err != nil {
		return err
	}
	for name := range strings.SplitSeq(rel, "/") {
		if p.v2 {
			delegate(dir)
		}
		parent := dir
		dir = filepath.Join(dir, name)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if p.has("cpuset") {
			if err := inheritCpuset(parent, dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// counted are the controllers of cgroup v2 that Stats reads.
var counted = []string{"cpu", "memory", "pids"}

// delegate lets the children of a cgroup v2 have controllers (Linux,
// Documentation/admin-guide/cgroup-v2.rst, "Enabling and Disabling"). It may
// not be possible, then there are fewer figures in Stats.
func delegate(dir string) {
	has, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	for _, c := range counted {
		if slices.Contains(strings.Fields(string(has)), c) {
			_ = write(dir, "cgroup.subtree_control", "+"+c)
		}
	}
}

// inheritCpuset gives a new cpuset its parent's CPUs and memory nodes: until it
// has some it takes no process (Linux, Documentation/admin-guide/cgroup-v1/cpusets.rst).
func inheritCpuset(parent, dir string) error {
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		if strings.TrimSpace(string(b)) != "" {
			continue
		}
		if b, err = os.ReadFile(filepath.Join(parent, name)); err != nil {
			return err
		}
		if err := write(dir, name, strings.TrimSpace(string(b))); err != nil {
			return err
		}
	}
	return nil
}

// write writes to a control file, which must exist.
func write(dir, name, value string) error {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// exists reports whether the folder is there.
func (p place) exists() bool {
	st, err := os.Stat(p.dir)
	return err == nil && st.IsDir()
}

// tree lists the folder and all below it, children first. What goes away
// meanwhile is left out.
func (p place) tree() ([]string, error) {
	var dirs []string
	err := filepath.WalkDir(p.dir, func(name string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if d.IsDir() {
			dirs = append(dirs, name)
		}
		return nil
	})
	slices.Reverse(dirs)
	return dirs, err
}

// pids lists the processes in the cgroup and those below it.
func (p place) pids() ([]int, error) {
	dirs, err := p.tree()
	if err != nil {
		return nil, err
	}
	var all []int
	for _, dir := range dirs {
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP) {
			continue // Removed just now, or threaded: its domain above lists them.
		}
		if err != nil {
			return nil, err
		}
		for s := range strings.FieldsSeq(string(b)) {
			pid, err := strconv.Atoi(s)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", path.Join(dir, "cgroup.procs"), err)
			}
			// 0 is a process outside this pid namespace.
			if pid != 0 {
				all = append(all, pid)
			}
		}
	}
	return all, nil
}

// thaw lets frozen processes go on where they could not die otherwise, which
// is on cgroup v1.
func (p place) thaw() {
	if p.has("freezer") {
		_ = write(p.dir, "freezer.state", "THAWED")
	}
}

// enter moves the calling thread into the cgroup, of cgroup v1, and returns
// how it gets back. What it starts is there from the beginning. A thread moves
// itself, by writing 0, without the lock over all processes of the machine that
// moving another takes.
func (p place) enter() (leave func() error, err error) {
	home, err := p.ofThread()
	if err != nil {
		return nil, err
	}
	back, err := os.OpenFile(filepath.Join(home, "tasks"), os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	if err := write(p.dir, "tasks", "0"); err != nil {
		back.Close()
		return nil, err
	}
	return func() error {
		_, err := back.WriteString("0")
		return errors.Join(err, back.Close())
	}, nil
}

// ofThread returns the folder of the calling thread in this hierarchy, of
// cgroup v1.
func (p place) ofThread() (string, error) {
	b, err := os.ReadFile("/proc/thread-self/cgroup")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		// cgroups(7): hierarchy-id:controller-list:path.
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) == 3 && fields[1] != "" && p.has(strings.Split(fields[1], ",")[0]) {
			return filepath.Join(p.root, fields[2]), nil
		}
	}
	return "", fmt.Errorf("%s: not in /proc/thread-self/cgroup", p.hierarchy)
}

// kill sends SIGKILL to every process that there is now.
func (p place) kill() error {
	if p.v2 {
		err := write(p.dir, "cgroup.kill", "1") // Since Linux 5.14.
		if err == nil || !p.exists() {
			return nil
		}
	}
	before, err := p.pids()
	if err != nil {
		return err
	}
	fds := map[int]int{}
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	for _, pid := range before {
		fd, err := unix.PidfdOpen(pid, 0)
		if err == nil {
			fds[pid] = fd
		}
	}
	// A pid that is listed again, after its process was pinned, is that process.
	after, err := p.pids()
	if err != nil {
		return err
	}
	var errs []error
	for _, pid := range after {
		if fd, ok := fds[pid]; ok && pid != os.Getpid() {
			if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, fmt.Errorf("kill process %d: %w", pid, err))
			}
		}
	}
	return errors.Join(errs...)
}

// remove removes the cgroup and those below it. It is unix.EBUSY while there
// are processes.
func (p place) remove() error {
	dirs, err := p.tree()
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
			return &fs.PathError{Op: "rmdir", Path: dir, Err: err}
		}
	}
	return nil
}

// Bounds of one wait for a change. At the end of each the cgroup is looked at
// again, so that what the kernel does not tell of is seen too.
const (
	minBackoff = time.Millisecond
	maxBackoff = 50 * time.Millisecond
)

// awaitChange returns when the cgroup may have got empty: at the kernel's word
// on cgroup v2, and after *backoff, which grows. It fails when ctx ends.
func (p place) awaitChange(ctx context.Context, backoff *time.Duration) error {
	wait := *backoff
	*backoff = min(2*wait, maxBackoff)
	if p.v2 && p.awaitEmpty(wait) {
		return context.Cause(ctx)
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

// awaitEmpty waits for a change of "populated 1" in cgroup.events, which the
// kernel makes known to who polls. False: there was nothing to wait for.
func (p place) awaitEmpty(wait time.Duration) bool {
	f, err := os.Open(filepath.Join(p.dir, "cgroup.events"))
	if err != nil {
		return false // Removed by somebody else.
	}
	defer f.Close()
	// The read makes this descriptor poll for changes from here on.
	buf := make([]byte, 4096)
	n, _ := f.ReadAt(buf, 0)
	if !strings.Contains(string(buf[:n]), "populated 1") {
		return false
	}
	fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}}
	_, err = unix.Poll(fds, int(wait.Milliseconds()))
	return err == nil
}
