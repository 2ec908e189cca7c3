//go:build linux

// Package anchor gives a container that runs inside a virtual machine a process
// on the host to be known by: a tiny program that sleeps for ever, whose pid,
// root and namespaces are safe to hand to whoever asks for "the container's
// pid".
//
// Contract. An anchor is in its pod's network namespace and in pid, ipc, uts,
// cgroup and mount namespaces of its own. Its root is the container's root file
// system as the host sees it, and its mount namespace holds nothing else of the
// host: /proc/<pid>/root and setns(2) show the container's files and volumes.
// It runs as nobody (65534), without capabilities, with no_new_privs and no
// open files. It dies with the thread of the pod that started it.
//
// The root file system and the volumes are taken as mounted when Start runs.
// The anchor keeps them mounted: Close it before they are unmounted.
//
// The program is a few hundred bytes of machine code (program.go). All that
// needs more is done by threads of the caller that enter the anchor's mount
// namespace, so nothing of the caller is executed again.
//
// Concurrency: every function may be called from any goroutine.
//
// Not guaranteed: file systems that only the guest has (tmpfs, /proc, /dev)
// are not seen below the anchor's root. As first process of its pid namespace
// an anchor ignores every signal but SIGKILL and SIGSTOP.
package anchor

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/tinyelf"
)

// maxArgs bounds the command line that an anchor shows, in bytes.
const maxArgs = 4096

// startTimeout bounds the anchor's own part of Start, a dozen system calls.
const startTimeout = 10 * time.Second

// Config describes one anchor.
type Config struct {
	// Args is the container's command line, which the anchor shows in the
	// process list after "vmrt:". Shortened to a few KiB.
	Args []string
	// Root is the container's root file system: an absolute path in the
	// pod's mount namespace.
	Root string
	// Binds are the container's volumes, in the order of their mounting.
	Binds []Bind
}

// Bind is a volume.
type Bind struct {
	// Source is an absolute path in the pod's mount namespace.
	Source string
	// Target is the path in the container. It is resolved inside Root, never
	// outside, whatever symbolic links Root holds; one that does not exist
	// there, is Root itself, or is not of the source's kind (folder or not),
	// is left out.
	Target string
}

// Anchor is a started anchor.
type Anchor struct {
	proc *podns.Process
}

// Start starts an anchor in ns. It returns once the anchor is unprivileged and
// sees nothing of the host but Root and Binds: a few milliseconds.
func Start(ns *podns.Namespaces, cfg Config) (*Anchor, error) {
	exe, err := executable()
	if err != nil {
		return nil, fmt.Errorf("start anchor: %w", err)
	}
	defer exe.Close()
	goRead, goWrite, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start anchor: %w", err)
	}
	defer goWrite.Close()
	okRead, okWrite, err := os.Pipe()
	if err != nil {
		goRead.Close()
		return nil, fmt.Errorf("start anchor: %w", err)
	}
	defer okRead.Close()

	proc, err := ns.StartProcess(&exec.Cmd{
		Path:   fmt.Sprintf("/proc/self/fd/%d", exe.Fd()),
		Args:   title(cfg.Args),
		Env:    []string{},
		Dir:    "/",
		Stdin:  goRead,
		Stdout: okWrite,
		SysProcAttr: &syscall.SysProcAttr{
			Setsid:     true,
			Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP,
		},
	})
	goRead.Close()
	okWrite.Close()
	if err != nil {
		return nil, fmt.Errorf("start anchor: %w", err)
	}
	err = proc.InMounts(func() error { return enterRoot(cfg.Root) })
	if err == nil {
		err = bind(ns, proc, cfg.Binds)
	}
	if err == nil {
		err = release(goWrite, okRead)
	}
	if err != nil {
		proc.Kill()
		return nil, fmt.Errorf("start anchor in %s: %w", cfg.Root, err)
	}
	return &Anchor{proc: proc}, nil
}

// release lets the anchor go on and waits until it has given up its privileges,
// when it writes a byte, and then its files, when the pipe ends.
func release(goWrite io.Writer, okRead *os.File) error {
	if err := okRead.SetReadDeadline(time.Now().Add(startTimeout)); err != nil {
		return err
	}
	if _, err := goWrite.Write([]byte{0}); err != nil {
		return err
	}
	b, err := io.ReadAll(okRead)
	if err == nil && len(b) != 1 {
		err = errors.New("it could not give up its privileges")
	}
	return err
}

// executable returns the anchor's program as a file that has no name.
func executable() (*os.File, error) {
	b, err := program()
	if err != nil {
		return nil, err
	}
	fd, err := tinyelf.Memfd(comm, b)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), comm), nil
}

// title returns the command line that ps shows for a container's.
func title(args []string) []string {
	t, room := []string{"vmrt:"}, maxArgs
	for _, a := range args {
		a = strings.ReplaceAll(a, "\x00", "")
		if len(a) >= room {
			t = append(t, a[:room])
			break
		}
		t, room = append(t, a), room-len(a)-1
	}
	return t
}

// Bind adds volumes to a started anchor: those whose targets the container's
// runtime has made since. ns is the pod that it was started in. The error is
// os.ErrProcessDone once the anchor has ended.
func (a *Anchor) Bind(ns *podns.Namespaces, binds ...Bind) error {
	if err := bind(ns, a.proc, binds); err != nil {
		return fmt.Errorf("add volumes to anchor: %w", err)
	}
	return nil
}

// Pid returns the anchor's process id on the host.
func (a *Anchor) Pid() int { return a.proc.Pid() }

// Done is closed when the anchor has ended and was reaped.
func (a *Anchor) Done() <-chan struct{} { return a.proc.Done() }

// Signal returns the signal that ended the anchor: SIGKILL after Close and
// after a `kill -9` on the host. 0 before Done.
func (a *Anchor) Signal() syscall.Signal {
	if st := a.proc.Status(); st.Signaled() {
		return st.Signal()
	}
	return 0
}

// Close kills the anchor and waits for its end. Idempotent.
func (a *Anchor) Close() error {
	a.proc.Kill()
	return nil
}
