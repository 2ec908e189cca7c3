package stdio

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"

	"github.com/vmrt/vmrt/api"
)

// discardPath is where the task service copies a terminal whose output nobody
// asked for; it must have some path.
const discardPath = "/dev/null"

// URLs are the stdio fields of a request: each is empty or an api.StreamURL.
type URLs struct{ Stdin, Stdout, Stderr string }

// Paths are the stdio fields for the task service.
type Paths struct{ Stdin, Stdout, Stderr string }

// Files are the process's own ends of its pipes, nil where it has no stream.
type Files struct{ Stdin, Stdout, Stderr *os.File }

// state is how far a process has come.
type state int

const (
	fresh state = iota
	started
	over
)

// Process is the stdio of one process.
type Process struct {
	terminal bool
	paths    Paths
	in       *input // nil without a stdin stream
	out, err *output

	mu    sync.Mutex
	state state
}

// serial numbers the FIFOs of this agent.
var serial atomic.Uint64

// Open takes the connections that u names and makes their pipes: FIFOs in the
// folder dir for a terminal, whose stderr must be empty, else nameless ones.
// On an error the connections already taken are closed.
func (r *Registry) Open(dir string, u URLs, terminal bool) (_ *Process, err error) {
	if terminal && u.Stderr != "" {
		return nil, fmt.Errorf("stderr %s of a terminal: %w", u.Stderr, errdefs.ErrInvalidArgument)
	}
	p := &Process{terminal: terminal}
	defer func() {
		if err != nil {
			p.Abort()
		}
	}()
	if terminal {
		base := filepath.Join(dir, fmt.Sprint(serial.Add(1)))
		p.paths.Stdout = discardPath
		if u.Stdin != "" {
			p.paths.Stdin = base + "-stdin"
		}
		if u.Stdout != "" {
			p.paths.Stdout = base + "-stdout"
		}
	}
	if p.in, err = open(r, u.Stdin, p.paths.Stdin, newInput); err != nil {
		return nil, err
	}
	if p.out, err = open(r, u.Stdout, p.paths.Stdout, newOutput); err != nil {
		return nil, err
	}
	p.err, err = open(r, u.Stderr, "", newOutput)
	return p, err
}

// open takes the connection that url names and makes one direction of it.
func open[T any](r *Registry, url, path string, make func(string, Conn, Limits) (*T, error)) (*T, error) {
	if url == "" {
		return nil, nil
	}
	name, ok := strings.CutPrefix(url, api.StreamURL(""))
	if !ok {
		return nil, fmt.Errorf("stdio %q: want %s: %w", url, api.StreamURL("NAME"), errdefs.ErrInvalidArgument)
	}
	conn, err := r.Take(name)
	if err != nil {
		return nil, err
	}
	t, err := make(path, conn, r.limits)
	if err != nil {
		conn.Close()
		return nil, err
	}
	return t, nil
}

// outputs returns those that there are.
func (p *Process) outputs() (all []*output) {
	for _, o := range []*output{p.out, p.err} {
		if o != nil {
			all = append(all, o)
		}
	}
	return all
}

// Paths returns what to put into the request for the task service: FIFOs of a
// terminal. Everything else the process is given as Files.
func (p *Process) Paths() Paths { return p.paths }

// Terminal reports whether the process has one.
func (p *Process) Terminal() bool { return p.terminal }

// Files returns what the process of a command that is about to start must be
// given. They are only valid until Handed.
func (p *Process) Files() (f Files) {
	if p.terminal {
		return f
	}
	if p.in != nil {
		f.Stdin = p.in.hold
	}
	if p.out != nil {
		f.Stdout = p.out.hold
	}
	if p.err != nil {
		f.Stderr = p.err.hold
	}
	return f
}

// Handed closes our copies of Files, now that the command has its own.
func (p *Process) Handed() {
	if p.terminal {
		return
	}
	if p.in != nil {
		p.in.release()
	}
	for _, o := range p.outputs() {
		o.release()
	}
}

// to changes the state from fresh to started, or from anything to over, and
// returns the one before.
func (p *Process) to(next state) state {
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.state
	if before < next {
		p.state = next
	}
	return before
}

// Started begins to move bytes. closeStdin makes the task service close its
// end of a terminal's stdin; it runs in a goroutine of its own, at most once,
// after the host's last byte.
func (p *Process) Started(closeStdin func()) {
	if p.to(started) != fresh {
		return
	}
	if p.in != nil {
		p.in.start(closeStdin)
	}
	for _, o := range p.outputs() {
		o.start()
	}
}

// Drain returns when the outputs have ended, or with ctx. Those of a terminal
// the task service drains itself.
func (p *Process) Drain(ctx context.Context) {
	p.mu.Lock()
	waits := p.state == started && !p.terminal
	p.mu.Unlock()
	if !waits {
		return
	}
	for _, o := range p.outputs() {
		select {
		case <-o.ended:
		case <-ctx.Done():
			return
		}
	}
}

// Deleted ends the input at once and the outputs when what is in their pipes
// was delivered. It does not wait.
func (p *Process) Deleted() { p.close(false) }

// Abort ends the streams of a process whose start has failed.
func (p *Process) Abort() { p.close(true) }

func (p *Process) close(abort bool) {
	before := p.to(over)
	if before == over {
		return
	}
	if p.in != nil {
		if before == fresh {
			p.in.abandon()
		} else {
			p.in.end()
		}
	}
	for _, o := range p.outputs() {
		if before == fresh {
			o.abandon()
			continue
		}
		if abort {
			o.conn.Close()
		}
		o.end()
	}
}

// Wait returns when nothing of the process is open any more.
func (p *Process) Wait() {
	if p.in != nil {
		<-p.in.done
	}
	for _, o := range p.outputs() {
		<-o.done
	}
}
