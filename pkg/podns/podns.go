//go:build linux

// Package podns gives a pod its own mount and network namespaces on the host
// without moving the process that holds them: one OS thread lives in them, and
// whatever belongs to the pod is done or forked on that thread.
//
// Contract. All of the pod's processes (VMM, file server, anchors) are started
// with Namespaces.Start and inherit both namespaces. Each gets SIGKILL as its
// parent-death signal, which follows the forking thread: when the process that
// holds the Namespaces dies, even by SIGKILL, they die too, the mount namespace
// loses its last member, and the kernel undoes every mount that was made in it.
// Nothing is left to clean up on the host.
//
// The mount namespace starts as a copy of the host's whose mounts are slaves of
// the host's: what the host mounts or unmounts later is seen here where the
// host's mounts are shared, and nothing that is mounted here is ever seen by
// the host. A host whose mounts are private gives a snapshot that stays as it
// was: paths of sources must be opened outside (see package storage).
//
// Concurrency: every method may be called from any goroutine. Functions given
// to Do run one at a time.
//
// Not guaranteed: a function that blocks in Do blocks every later one, and
// Close, for as long as it does. Where the host's mounts are private, what it
// had mounted when the pod was made stays in use by the pod until that ends,
// even if the host unmounts it.
//
// Linux 5.8 or newer (setns(2) by pidfd).
package podns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/thread"
)

// ErrClosed is returned by every operation after Close.
var ErrClosed = errors.New("pod namespaces are closed")

// Config says which namespaces Open makes.
type Config struct {
	// NetNS is the path of the network namespace to join, as the CNI or the
	// OCI spec names it ("/run/netns/x", "/proc/self/ns/net" for the
	// host's). It is opened in the host's mount namespace. Empty: a new one,
	// with its loopback interface up.
	NetNS string
	// Start starts a prepared command from the calling thread, in place of
	// cmd.Start: into the pod's cgroup, say. It is called on the pod's
	// thread. May be nil.
	Start func(cmd *exec.Cmd) error
}

// Namespaces is a thread that lives in a pod's mount and network namespaces.
type Namespaces struct {
	start func(cmd *exec.Cmd) error
	tid   int
	// claimed holds the network namespace for this pod; used on the thread.
	claimed *os.File

	work chan call
	quit chan struct{} // closed by Close
	gone chan struct{} // closed when the thread takes no more work

	closing sync.Once
}

type call struct {
	f    func() error
	done chan error
}

// Open makes the namespaces and the thread that holds them. A NetNS that is not
// there, or is no network namespace, is an errdefs.ErrFailedPrecondition.
func Open(cfg Config) (*Namespaces, error) {
	netns, err := openNet(cfg.NetNS)
	if err != nil {
		return nil, err
	}
	if netns != nil {
		defer netns.Close()
	}
	n := &Namespaces{
		start: cfg.Start,
		work:  make(chan call),
		quit:  make(chan struct{}),
		gone:  make(chan struct{}),
	}
	if n.start == nil {
		n.start = (*exec.Cmd).Start
	}
	ready := make(chan error, 1)
	thread.Go(func() { n.serve(netns, ready) })
	if err := <-ready; err != nil {
		return nil, err
	}
	return n, nil
}

// serve is the life of the thread. It returns without unlocking the thread,
// which ends with it.
func (n *Namespaces) serve(netns *os.File, ready chan<- error) {
	defer close(n.gone)
	defer func() {
		if n.claimed != nil {
			n.claimed.Close()
		}
	}()
	n.tid = unix.Gettid()
	if err := enterNew(netns); err != nil {
		ready <- err
		return
	}
	ready <- nil
	for {
		select {
		case c := <-n.work:
			c.done <- c.f()
		case <-n.quit:
			return
		}
	}
}

// Do runs f on the thread and returns its error. ctx bounds the wait for the
// thread, not f itself, which bounds itself. f must not call a method of n
// that runs something on the thread, must leave the working directory and the
// namespaces as they are, and knows that goroutines it starts run elsewhere,
// on the host's side.
func (n *Namespaces) Do(ctx context.Context, f func() error) error {
	c := call{f: f, done: make(chan error, 1)}
	select {
	case <-n.quit: // wins over a thread that has not noticed yet
		return ErrClosed
	default:
	}
	select {
	case n.work <- c:
		return <-c.done
	case <-n.quit:
		return ErrClosed
	case <-ctx.Done():
		return fmt.Errorf("wait for the pod's thread: %w", context.Cause(ctx))
	}
}

// Start starts cmd, as cmd.Start does, as a child of the thread: in the pod's
// namespaces, killed when the thread ends. It is a hypervisor.StartFunc.
// cmd.Path is looked up in the pod's mount namespace. Where cmd.SysProcAttr
// asks for other credentials the signal still holds; a program that changes
// them itself clears it (prctl(2), PR_SET_PDEATHSIG).
func (n *Namespaces) Start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	return n.Do(context.Background(), func() error { return n.start(cmd) })
}

// SetNet moves the thread, and so what is started later, to the network
// namespace at path, opened in the host's mount namespace. Processes started
// before stay where they are.
func (n *Namespaces) SetNet(path string) error {
	netns, err := openNet(path)
	if err != nil {
		return err
	}
	if netns == nil {
		return errors.New("join network namespace: no path")
	}
	defer netns.Close()
	return n.Do(context.Background(), func() error { return joinNet(netns) })
}

// NetPath returns a path that names the pod's network namespace on the host
// until Close. Opening it is enough to keep the namespace afterwards.
func (n *Namespaces) NetPath() string { return n.nsPath("net") }

// MountPath returns a path that names the pod's mount namespace on the host
// until Close.
func (n *Namespaces) MountPath() string { return n.nsPath("mnt") }

func (n *Namespaces) nsPath(kind string) string {
	return fmt.Sprintf("/proc/%d/task/%d/ns/%s", os.Getpid(), n.tid, kind)
}

// Net returns the pod's network namespace. The caller closes it.
func (n *Namespaces) Net() (*os.File, error) {
	return n.open("net")
}

// Mount returns the pod's mount namespace. The caller closes it.
func (n *Namespaces) Mount() (*os.File, error) {
	return n.open("mnt")
}

func (n *Namespaces) open(kind string) (f *os.File, err error) {
	err = n.Do(context.Background(), func() error {
		f, err = os.Open("/proc/thread-self/ns/" + kind)
		return err
	})
	return f, err
}

// Close ends the thread and with it every process that Start started: their
// parent-death signal is SIGKILL. It returns when no more work can run there;
// the processes are still to be waited for by whoever started them. The mounts
// go with the last process. Idempotent.
func (n *Namespaces) Close() error {
	n.closing.Do(func() { close(n.quit) })
	<-n.gone
	return nil
}
