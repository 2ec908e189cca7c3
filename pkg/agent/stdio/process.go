package stdio

import (
	"fmt"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/containerd/errdefs"

	"github.com/vmrt/vmrt/api"
)

// discard is where the task service copies an output that nobody asked for.
// It opens both names as soon as one is set.
const discard = "/dev/null"

// URLs are the stdio fields of a request: each is empty or an api.StreamURL.
type URLs struct{ Stdin, Stdout, Stderr string }

// Paths are the stdio fields for the task service.
type Paths struct{ Stdin, Stdout, Stderr string }

// Process is the stdio of one process.
type Process struct {
	paths   Paths
	in      *input // nil without a stdin stream
	outputs []*output
}

// serial numbers the FIFOs of this process.
var serial atomic.Uint64

// Open takes the connections that u names and makes their FIFOs in dir. On an
// error those already taken are closed. With terminal set, stderr must be
// empty: a terminal has one output.
func (r *Registry) Open(dir string, u URLs, terminal bool) (_ *Process, err error) {
	if terminal && u.Stderr != "" {
		return nil, fmt.Errorf("stderr %s of a terminal: %w", u.Stderr, errdefs.ErrInvalidArgument)
	}
	p := &Process{}
	defer func() {
		if err != nil {
			p.Abort()
		}
	}()
	base := filepath.Join(dir, fmt.Sprint(serial.Add(1)))
	if u.Stdin != "" {
		conn, err := r.takeURL(u.Stdin)
		if err != nil {
			return nil, err
		}
		p.paths.Stdin = base + "-stdin"
		if p.in, err = newInput(p.paths.Stdin, conn, r.limits); err != nil {
			conn.Close()
			return nil, err
		}
	}
	if p.paths.Stdout, err = r.openOutput(p, u.Stdout, base+"-stdout"); err != nil {
		return nil, err
	}
	if p.paths.Stderr, err = r.openOutput(p, u.Stderr, base+"-stderr"); err != nil {
		return nil, err
	}
	p.fillMissing(u, terminal)
	return p, nil
}

// openOutput returns the path for the task service, empty if url is.
func (r *Registry) openOutput(p *Process, url, path string) (string, error) {
	if url == "" {
		return "", nil
	}
	conn, err := r.takeURL(url)
	if err != nil {
		return "", err
	}
	o, err := newOutput(path, conn, r.limits)
	if err != nil {
		conn.Close()
		return "", err
	}
	p.outputs = append(p.outputs, o)
	return path, nil
}

func (r *Registry) takeURL(url string) (Conn, error) {
	name, ok := strings.CutPrefix(url, api.StreamURL(""))
	if !ok {
		return nil, fmt.Errorf("stdio %q: want %s: %w", url, api.StreamURL("NAME"), errdefs.ErrInvalidArgument)
	}
	return r.Take(name)
}

// fillMissing gives the task service the names that it opens in any case.
func (p *Process) fillMissing(u URLs, terminal bool) {
	if u == (URLs{}) && !terminal {
		return // no copying at all
	}
	if p.paths.Stdout == "" {
		p.paths.Stdout = discard
	}
	if p.paths.Stderr == "" && !terminal {
		p.paths.Stderr = discard
	}
}

// Paths returns what to put into the request for the task service.
func (p *Process) Paths() Paths { return p.paths }

// HasStdin reports whether a stream feeds the process.
func (p *Process) HasStdin() bool { return p.in != nil }

// Started begins to move bytes. closeStdin makes the task service close its
// end of stdin; it runs in a goroutine of its own, at most once, after the
// host's last byte.
func (p *Process) Started(closeStdin func()) {
	for _, o := range p.outputs {
		o.start()
	}
	if p.in != nil {
		p.in.start(closeStdin)
	}
}

// Deleted ends the input at once and the outputs when what is in them was
// delivered. It does not wait.
func (p *Process) Deleted() {
	if p.in != nil {
		p.in.end()
	}
	for _, o := range p.outputs {
		o.abort() // one that was never started
		o.end()
	}
}

// Abort closes everything of a process that did not start.
func (p *Process) Abort() {
	if p.in != nil {
		p.in.end()
	}
	for _, o := range p.outputs {
		o.abort()
	}
}

// Wait returns when nothing of the process is open any more.
func (p *Process) Wait() {
	if p.in != nil {
		<-p.in.done
	}
	for _, o := range p.outputs {
		<-o.done
	}
}
