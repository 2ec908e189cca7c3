// Package pod makes what the containers of a pod share inside the virtual
// machine: ipc and uts namespaces, a pid namespace when they ask for one, and
// a tmpfs as their /dev/shm. The network namespace is the machine's own.
//
// The namespaces are kept by bind mounts of their /proc files, not by
// processes, except that a pid namespace lives as long as its first process
// (package pause). Those of a pod with a user namespace are there already
// (package userns).
//
// Methods may be called from any goroutine.
package pod

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/containerd/v2/pkg/sys/reaper"
	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/agent/pause"
	"github.com/vmrt/vmrt/pkg/agent/userns"
	"github.com/vmrt/vmrt/pkg/idmap"
	"github.com/vmrt/vmrt/pkg/thread"
)

// maxSysctls bounds the sysctls of a pod.
const maxSysctls = 256

// Pod is the virtual machine's one pod.
type Pod struct {
	namespaces, shm string // folders
	ids             idmap.Mapping

	mu      sync.Mutex
	open    bool
	targets []string // mounts, in the order in which they were made
	init    *os.Process
	ended   chan struct{} // closed when init was reaped
}

// New returns a pod that is not open yet. ids are those of its user namespace,
// and first is the first process of the pid namespace there; without a user
// namespace both are zero.
func New(ids idmap.Mapping, first *os.Process) *Pod {
	p := &Pod{namespaces: api.PodNamespaces, shm: api.PodShm, ids: ids, init: first}
	if first != nil {
		p.ended = make(chan struct{})
		go func(ended chan<- struct{}) {
			// Whoever reaps it first, it has ended then.
			_, _ = first.Wait()
			close(ended)
		}(p.ended)
	}
	return p
}

// Open makes the pod. A second time it is errdefs.ErrAlreadyExists. After an
// error nothing is left.
func (p *Pod) Open(r *api.OpenPodRequest) (err error) {
	if len(r.Sysctls) > maxSysctls {
		return fmt.Errorf("open pod: %d sysctls: at most %d: %w", len(r.Sysctls), maxSysctls, errdefs.ErrInvalidArgument)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	inUserNS := !p.ids.IsZero()
	switch {
	case p.open:
		return fmt.Errorf("open pod: %w", errdefs.ErrAlreadyExists)
	case inUserNS && p.init == nil:
		return fmt.Errorf("open pod: it was closed, and its user namespace with it: %w", errdefs.ErrFailedPrecondition)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("open pod: %w", errors.Join(err, p.undo()))
		}
	}()
	if err := os.MkdirAll(p.namespaces, 0o711); err != nil {
		return err
	}
	if err := thread.Run(func() error { return p.enter(r) }); err != nil {
		return err
	}
	if r.Pid && !inUserNS {
		if err := p.startInit(); err != nil {
			return err
		}
	}
	if r.ShmBytes > 0 {
		if err := p.mountShm(r.ShmBytes); err != nil {
			return err
		}
	}
	p.open = true
	return nil
}

// enter moves the calling thread into the pod's ipc and uts namespaces and sets
// what they hold.
func (p *Pod) enter(r *api.OpenPodRequest) error {
	join := p.make
	if !p.ids.IsZero() {
		join = p.join
	}
	if err := join(); err != nil {
		return err
	}
	if r.Hostname != "" {
		if err := invalid(unix.Sethostname([]byte(r.Hostname))); err != nil {
			return fmt.Errorf("set host name %q: %w", r.Hostname, err)
		}
	}
	if r.Domainname != "" {
		if err := invalid(unix.Setdomainname([]byte(r.Domainname))); err != nil {
			return fmt.Errorf("set domain name %q: %w", r.Domainname, err)
		}
	}
	return p.setSysctls(r.Sysctls)
}

// setSysctls writes the sysctls of the calling thread's namespaces. In a user
// namespace those of the network are anybody's who has power over it
// (net_ctl_permissions in net/sysctl_net.c), which the thread has; the others
// are the namespace's root's alone, whom it becomes for them.
func (p *Pod) setSysctls(sysctls map[string]string) error {
	var network, others []string
	for _, key := range slices.Sorted(maps.Keys(sysctls)) {
		if strings.HasPrefix(strings.ReplaceAll(key, "/", "."), "net.") {
			network = append(network, key)
		} else {
			others = append(others, key)
		}
	}
	for i, key := range slices.Concat(network, others) {
		if i == len(network) && !p.ids.IsZero() {
			if err := actAs(p.ids.Root()); err != nil {
				return err
			}
		}
		if err := setSysctl("/proc/sys", key, sysctls[key]); err != nil {
			return err
		}
	}
	return nil
}

// make makes the namespaces and keeps them.
func (p *Pod) make() error {
	if err := unix.Unshare(unix.CLONE_NEWIPC | unix.CLONE_NEWUTS); err != nil {
		return fmt.Errorf("make ipc and uts namespaces: %w", err)
	}
	// This is not /proc/self, the thread that has started the process.
	for _, kind := range []string{"ipc", "uts"} {
		if err := p.keep(fmt.Sprintf("/proc/thread-self/ns/%s", kind), kind); err != nil {
			return err
		}
	}
	return nil
}

// join joins those that are there.
func (p *Pod) join() error {
	for _, kind := range []string{"ipc", "uts"} {
		f, err := os.Open(filepath.Join(p.namespaces, kind))
		if err != nil {
			return err
		}
		err = unix.Setns(int(f.Fd()), 0)
		f.Close()
		if err != nil {
			return fmt.Errorf("join %s namespace: %w", kind, err)
		}
	}
	return nil
}

// actAs makes the calling thread, and no other, somebody else for good.
func actAs(uid, gid uint32) error {
	const same = ^uintptr(0)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, same, uintptr(gid), same); errno != 0 {
		return fmt.Errorf("act as group %d: %w", gid, errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, same, uintptr(uid), same); errno != 0 {
		return fmt.Errorf("act as user %d: %w", uid, errno)
	}
	return nil
}

// setSysctl writes a sysctl of the calling thread's namespaces. Dots separate,
// as for runc; an interface's name can keep its own by slashes.
func setSysctl(root, key, value string) error {
	path := filepath.Join(root, strings.ReplaceAll(key, ".", "/"))
	if !strings.HasPrefix(path, root+"/") || strings.Contains(key, "..") {
		return fmt.Errorf("sysctl %q: %w", key, errdefs.ErrInvalidArgument)
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(value)
		err = errors.Join(err, f.Close())
	}
	if err := invalid(err); err != nil {
		return fmt.Errorf("write sysctl %s = %q: %w", key, value, err)
	}
	return nil
}

// invalid gives an error its kind where it means that the request is wrong.
func invalid(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}

// keep binds a namespace to its file.
func (p *Pod) keep(source, kind string) error {
	target := filepath.Join(p.namespaces, kind)
	if err := userns.Keep(source, target); err != nil {
		return err
	}
	p.targets = append(p.targets, target)
	return nil
}

// startInit makes the pid namespace.
func (p *Pod) startInit() error {
	var cmd *exec.Cmd
	var exits chan runc.Exit
	err := pause.Start(filepath.Dir(p.namespaces), syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}, func(c *exec.Cmd) (err error) {
		cmd = c
		exits, err = reaper.Default.Start(c)
		return err
	})
	if err != nil {
		return fmt.Errorf("start first process of the pod's pid namespace: %w", err)
	}
	p.init, p.ended = cmd.Process, make(chan struct{})
	go func(ended chan<- struct{}) {
		// How it ended is of no interest.
		_, _ = reaper.Default.Wait(cmd, exits)
		close(ended)
	}(p.ended)
	return p.keep(fmt.Sprintf("/proc/%d/ns/pid", cmd.Process.Pid), "pid")
}

func (p *Pod) mountShm(size uint64) error {
	if err := os.MkdirAll(p.shm, 0o755); err != nil {
		return err
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	uid, gid := p.ids.Root()
	options := fmt.Sprintf("mode=1777,size=%d,uid=%d,gid=%d", size, uid, gid)
	if err := unix.Mount("shm", p.shm, "tmpfs", flags, options); err != nil {
		return fmt.Errorf("mount /dev/shm of %d bytes: %w", size, err)
	}
	p.targets = append(p.targets, p.shm)
	return nil
}

// Close ends the processes of the pod's pid namespace and lets go of the rest.
// Containers that use it keep it until they end. Idempotent.
func (p *Pod) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open = false
	if err := p.undo(); err != nil {
		return fmt.Errorf("close pod: %w", err)
	}
	return nil
}

func (p *Pod) undo() error {
	var errs []error
	if p.init != nil {
		// By pidfd: it may have been reaped already.
		errs = append(errs, ignore(p.init.Kill(), os.ErrProcessDone))
		<-p.ended
		p.init = nil
	}
	for _, target := range slices.Backward(p.targets) {
		errs = append(errs, ignore(unix.Unmount(target, unix.MNT_DETACH), unix.EINVAL))
	}
	p.targets = nil
	return errors.Join(errs...)
}

func ignore(err, kind error) error {
	if errors.Is(err, kind) {
		return nil
	}
	return err
}
