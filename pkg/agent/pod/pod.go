// Package pod makes what the containers of a pod share inside the virtual
// machine: ipc and uts namespaces, a pid namespace when they ask for one, and
// a tmpfs as their /dev/shm. The network namespace is the machine's own.
//
// The namespaces are kept by bind mounts of their /proc files, not by
// processes, except that a pid namespace lives as long as its first process: a
// tiny program called /pause, as Kubernetes users know it, which reaps orphans.
//
// Methods may be called from any goroutine.
package pod

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/containerd/v2/pkg/sys/reaper"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/thread"
	"github.com/vmrt/vmrt/pkg/tinyelf"
)

// maxSysctls bounds the sysctls of a pod.
const maxSysctls = 256

// Pod is the virtual machine's one pod.
type Pod struct {
	namespaces, shm string // folders

	mu      sync.Mutex
	open    bool
	targets []string // mounts, in the order in which they were made
	init    *os.Process
	ended   chan struct{} // closed when init was reaped
}

// New returns a pod that is not open yet.
func New() *Pod { return &Pod{namespaces: api.PodNamespaces, shm: api.PodShm} }

// Open makes the pod. A second time it is errdefs.ErrAlreadyExists. After an
// error nothing is left.
func (p *Pod) Open(r *api.OpenPodRequest) (err error) {
	if len(r.Sysctls) > maxSysctls {
		return fmt.Errorf("open pod: %d sysctls: at most %d: %w", len(r.Sysctls), maxSysctls, errdefs.ErrInvalidArgument)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open {
		return fmt.Errorf("open pod: %w", errdefs.ErrAlreadyExists)
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
	if r.Pid {
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

// enter moves the calling thread into the pod's namespaces and keeps them.
func (p *Pod) enter(r *api.OpenPodRequest) error {
	if err := unix.Unshare(unix.CLONE_NEWIPC | unix.CLONE_NEWUTS); err != nil {
		return fmt.Errorf("make ipc and uts namespaces: %w", err)
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
	for _, key := range sortedKeys(r.Sysctls) {
		if err := setSysctl("/proc/sys", key, r.Sysctls[key]); err != nil {
			return err
		}
	}
	// This is not /proc/self, the thread that has started the process.
	for _, kind := range []string{"ipc", "uts"} {
		if err := p.keep(fmt.Sprintf("/proc/thread-self/ns/%s", kind), kind); err != nil {
			return err
		}
	}
	return nil
}

func sortedKeys(m map[string]string) (keys []string) {
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
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
	f, err := os.OpenFile(target, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("keep %s namespace: %w", kind, err)
	}
	p.targets = append(p.targets, target)
	return nil
}

// startInit makes the pid namespace.
func (p *Pod) startInit() error {
	program, err := tinyelf.Link(initData, writeInit)
	if err != nil {
		return err
	}
	fd, err := tinyelf.Memfd(initName, program)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	cmd := &exec.Cmd{
		Path: fmt.Sprintf("/proc/self/fd/%d", fd), Args: []string{"/" + initName}, Env: []string{}, Dir: "/",
		SysProcAttr: &syscall.SysProcAttr{Setsid: true, Cloneflags: unix.CLONE_NEWPID},
	}
	exits, err := reaper.Default.Start(cmd)
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

// initName is what ps shows.
const initName = "pause"

// initData is the program's struct sigaction: SIG_IGN, no flags, no mask.
var initData = []byte{31: 0, 0: 1}

// writeInit appends the program: it ignores SIGCHLD, so that the kernel reaps
// what is left to it (sigaction(2)), and sleeps.
func writeInit(p *tinyelf.Program) (entry int) {
	const maskBytes = 8
	entry = p.Pos()
	p.Call(p.Syscalls.RtSigaction, uint32(unix.SIGCHLD), tinyelf.DataAddr, 0, maskBytes)
	p.Call(p.Syscalls.CloseRange, 0, ^uint32(0), 0)
	loop := p.Pos()
	p.Call(p.Syscalls.Ppoll, 0, 0, 0, 0)
	p.Jump(loop)
	return entry
}

func (p *Pod) mountShm(size uint64) error {
	if err := os.MkdirAll(p.shm, 0o755); err != nil {
		return err
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("shm", p.shm, "tmpfs", flags, fmt.Sprintf("mode=1777,size=%d", size)); err != nil {
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
