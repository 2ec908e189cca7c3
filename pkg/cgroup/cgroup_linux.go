// Package cgroup gives a pod its cgroup on the host: the virtual machine and
// its helpers run in it, are counted in it, and are found in it when whoever
// started them is dead.
//
// It works with cgroup v2, with v1, and with both at once; the cgroup is made
// in every hierarchy below /sys/fs/cgroup. Paths are those of the cgroup file
// system. A systemd path is translated and made in the same way, without
// systemd being asked. No limits are set.
//
// A hierarchy that cannot be used, because it is read-only or lacks a
// controller, is left out with a warning, even when none remains: then Pids
// and Stats are empty, and Kill kills nobody. Whoever needs more has to look
// at Warnings.
//
// All methods may be called from any goroutine, and in any order: Kill and
// Remove are idempotent, and nothing else fails because of them other than by
// saying that the cgroup is gone. On cgroup v1 a process that forks faster
// than it is listed may escape one round of Kill, but not its end, which is
// that none is left.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// removeTimeout bounds Kill and Remove, whatever the caller's context.
const removeTimeout = 10 * time.Second

// Cgroup is a pod's cgroup in every hierarchy that has it.
type Cgroup struct {
	path   string
	places []place // fixed; cgroup v2 first

	mu       sync.Mutex
	warnings []string // guarded by mu
}

// Create makes the cgroup that an OCI cgroupsPath names: "/a/b", "a/b", which
// is the same, or "slice:prefix:name" in systemd's way. Empty stands for
// /vmrt/<id>. It fails when the path is not one for a pod, or when there are
// processes in it already.
func Create(cgroupsPath, id string) (*Cgroup, error) {
	hs, err := hierarchies()
	if err != nil {
		return nil, err
	}
	return create(hs, cgroupsPath, id)
}

func create(hs []hierarchy, cgroupsPath, id string) (*Cgroup, error) {
	p, err := resolve(cgroupsPath, id)
	if err != nil {
		return nil, err
	}
	c := &Cgroup{path: p}
	for _, pl := range placesOf(hs, p) {
		err := pl.checkEmpty()
		if errdefs.IsFailedPrecondition(err) {
			return nil, errors.Join(fmt.Errorf("create cgroup %s: %w", p, err), c.undo())
		}
		if err == nil {
			err = pl.makeRetrying()
		}
		if err != nil {
			c.warn(fmt.Sprintf("%s has no %s: %v", pl.hierarchy, p, err))
			continue
		}
		c.places = append(c.places, pl)
	}
	if len(c.places) == 0 {
		c.warn(fmt.Sprintf("no cgroup hierarchy has %s", p))
	}
	return c, nil
}

func placesOf(hs []hierarchy, p string) []place {
	var all []place
	for _, h := range hs {
		all = append(all, place{hierarchy: h, dir: filepath.Join(h.root, p)})
	}
	return all
}

// checkEmpty refuses a cgroup that is somebody's: Kill would kill them. The
// words are runc's.
func (p place) checkEmpty() error {
	pids, err := p.pids()
	if err != nil {
		return err
	}
	if len(pids) > 0 {
		return fmt.Errorf("%s: container's cgroup is not empty: %d process(es) found: %w",
			p.hierarchy, len(pids), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// makeRetrying makes the folder although Remove of another pod may take an
// empty folder above it away meanwhile.
func (p place) makeRetrying() (err error) {
	for range 100 {
		if err = p.make(); !errors.Is(err, os.ErrNotExist) {
			break
		}
	}
	return err
}

// undo removes what an unfinished Create has made.
func (c *Cgroup) undo() error {
	var errs []error
	for _, p := range c.places {
		errs = append(errs, p.remove())
	}
	return errors.Join(errs...)
}

// Load finds the cgroup that another process made, by its Path. One that is
// gone is no error: there is nothing in it.
func Load(path string) (*Cgroup, error) {
	hs, err := hierarchies()
	if err != nil {
		return nil, err
	}
	return load(hs, path)
}

func load(hs []hierarchy, path string) (*Cgroup, error) {
	if err := check(path); err != nil {
		return nil, err
	}
	c := &Cgroup{path: path}
	for _, p := range placesOf(hs, path) {
		if p.exists() {
			c.places = append(c.places, p)
		}
	}
	return c, nil
}

// Path is the cgroup's path below each hierarchy's root, for Load.
func (c *Cgroup) Path() string { return c.path }

// Warnings says which hierarchies do not have the cgroup or did not take a
// process, and why.
func (c *Cgroup) Warnings() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.warnings)
}

func (c *Cgroup) warn(w string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.Contains(c.warnings, w) {
		c.warnings = append(c.warnings, w)
	}
}

// Start starts cmd, as cmd.Start does, in the cgroup: the process is in it from
// its first instruction, so that no child of it can be elsewhere. Where the
// kernel does not let that be it is moved at once. When it cannot be moved it
// is killed and waited for.
//
// The calling thread is cmd's parent; on cgroup v1 it is in the cgroup itself
// meanwhile. cmd.SysProcAttr must not name another cgroup.
func (c *Cgroup) Start(cmd *exec.Cmd) error {
	if err := c.start(cmd); err != nil {
		return fmt.Errorf("start %s in cgroup %s: %w", cmd.Path, c.path, err)
	}
	return nil
}

func (c *Cgroup) start(cmd *exec.Cmd) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	in := map[string]bool{} // the folders of places that need no move after
	var leave []func() error
	for _, p := range c.places {
		if !p.v2 {
			if l, err := p.enter(); err == nil {
				leave = append(leave, l)
				in[p.dir] = true
			}
			continue
		}
		if !cloneIntoCgroup() {
			continue
		}
		dir, err := os.OpenFile(p.dir, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return err
		}
		defer dir.Close()
		if cmd.SysProcAttr == nil {
			cmd.SysProcAttr = &syscall.SysProcAttr{}
		}
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
		in[p.dir] = true
	}
	started := cmd.Start()
	var errs []error
	for _, l := range leave {
		errs = append(errs, l())
	}
	err := errors.Join(errs...)
	if err != nil {
		// Nothing else may run on this thread: it ends with this goroutine.
		runtime.LockOSThread()
	}
	if started != nil {
		return errors.Join(started, err)
	}
	if err == nil {
		err = c.add(cmd.Process.Pid, in)
	}
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	return err
}

// cloneIntoCgroup reports whether a process can be started in a cgroup: with
// clone3(2), which answers a request of no size with EINVAL, and which old
// kernels and seccomp profiles lack.
var cloneIntoCgroup = sync.OnceValue(func() bool {
	_, _, errno := unix.RawSyscall(unix.SYS_CLONE3, 0, 0, 0)
	return errno == unix.EINVAL
})

// Add moves a process that runs already. One that has ended is no error.
func (c *Cgroup) Add(pid int) error {
	if err := c.add(pid, nil); err != nil {
		return fmt.Errorf("move process %d to cgroup %s: %w", pid, c.path, err)
	}
	return nil
}

// add moves a process in all hierarchies but those done. That one takes it is
// enough for Pids and Kill.
func (c *Cgroup) add(pid int, done map[string]bool) error {
	var errs []error
	for _, p := range c.places {
		if done[p.dir] {
			continue
		}
		err := write(p.dir, "cgroup.procs", fmt.Sprint(pid))
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", p.hierarchy, err))
		}
	}
	if len(errs) > 0 && len(errs) == len(c.places) {
		return errors.Join(errs...)
	}
	for _, err := range errs {
		c.warn(err.Error())
	}
	return nil
}

// Pids lists the processes, also those of cgroups below it.
func (c *Cgroup) Pids() ([]int, error) {
	var all []int
	for _, p := range c.places {
		pids, err := p.pids()
		if err != nil {
			return nil, fmt.Errorf("list processes of cgroup %s: %w", c.path, err)
		}
		all = append(all, pids...)
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// Kill sends SIGKILL to every process until none is left. It fails when ctx
// ends first, or after 10 s. This process itself is never killed on cgroup v1,
// and must not be in the cgroup on v2.
func (c *Cgroup) Kill(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, removeTimeout)
	defer cancel()
	backoff := minBackoff
	for {
		pids, err := c.Pids()
		if err != nil || len(pids) == 0 {
			return err
		}
		for _, p := range c.places {
			p.thaw()
		}
		var errs []error
		for _, p := range c.places {
			errs = append(errs, p.kill())
		}
		if err = errors.Join(errs...); err == nil {
			// The first place is the one that tells of a change, if any does.
			err = c.places[0].awaitChange(ctx, &backoff)
		}
		if err != nil {
			return fmt.Errorf("kill processes of cgroup %s: %w%s", c.path, err, left(pids))
		}
	}
}

// left names the processes that are left, at most ten.
func left(pids []int) string {
	if len(pids) == 0 {
		return ""
	}
	return fmt.Sprintf(": %d left, such as %v", len(pids), pids[:min(len(pids), 10)])
}

// Remove removes the cgroup and all below it once no process is in it. It kills
// nobody. It fails when ctx ends first, or after 10 s. Idempotent.
func (c *Cgroup) Remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, removeTimeout)
	defer cancel()
	var errs []error
	for _, p := range c.places {
		backoff := minBackoff
		err := p.remove()
		for errors.Is(err, unix.EBUSY) {
			if werr := p.awaitChange(ctx, &backoff); werr != nil {
				pids, _ := p.pids()
				return fmt.Errorf("remove cgroup %s: %w: %w%s", c.path, err, werr, left(pids))
			}
			err = p.remove()
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("remove cgroup %s: %w", c.path, err))
			continue
		}
		if path.Dir(c.path) == defaultParent {
			// Ours, and gone with the last pod in it.
			_ = unix.Rmdir(filepath.Join(p.root, defaultParent))
		}
	}
	return errors.Join(errs...)
}
