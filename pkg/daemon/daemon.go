//go:build linux

// Package daemon runs the programs that serve one pod on the host beside its
// virtual machine: virtiofsd, passt.
//
// Contract. A Daemon is a child of the pod's thread (package podns): in its
// namespaces and cgroup, and killed with it. Its output is kept, the last 2 KiB
// of it, to say why it ended.
//
// Concurrency: every method may be called from any goroutine.
//
// Not guaranteed: that what the program forks ends with it. A program that
// does so is started as first of a pid namespace.
package daemon

import (
	"fmt"
	"os"
	"os/exec"
	"sync/atomic"

	"github.com/vmrt/vmrt/pkg/podns"
)

// Daemon is a running program.
type Daemon struct {
	name   string
	proc   *podns.Process
	output *tail
	done   chan struct{}
	closed atomic.Bool
}

// Start starts cmd in ns. name is for errors. cmd's stdin must be nil or a
// file; its output is the Daemon's.
func Start(ns *podns.Namespaces, name string, cmd *exec.Cmd) (*Daemon, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.Stdout, cmd.Stderr = w, w
	proc, err := ns.StartProcess(cmd)
	w.Close()
	if err != nil {
		r.Close()
		return nil, err
	}
	d := &Daemon{name: name, proc: proc, output: new(tail), done: make(chan struct{})}
	go func() {
		defer close(d.done)
		defer r.Close()
		// Ends with the last process that has the pipe.
		_, _ = d.output.ReadFrom(r)
		<-proc.Done()
	}()
	return d, nil
}

// Pid returns the process's id on the host.
func (d *Daemon) Pid() int { return d.proc.Pid() }

// Done is closed when the daemon has ended and was reaped.
func (d *Daemon) Done() <-chan struct{} { return d.done }

// Err says why the daemon ended, with the end of its output. Nil before Done,
// after an exit with status 0, and after Close.
func (d *Daemon) Err() error {
	select {
	case <-d.done:
	default:
		return nil
	}
	st := d.proc.Status()
	switch {
	case d.closed.Load(), st.Exited() && st.ExitStatus() == 0:
		return nil
	case st.Signaled():
		return fmt.Errorf("%s: %v%s", d.name, st.Signal(), d.output)
	default:
		return fmt.Errorf("%s: exit status %d%s", d.name, st.ExitStatus(), d.output)
	}
}

// Close kills the daemon and waits for its end. Idempotent.
func (d *Daemon) Close() {
	d.closed.Store(true)
	d.proc.Kill()
	<-d.done
}
