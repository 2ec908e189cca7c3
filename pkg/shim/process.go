package shim

import (
	"context"
	"fmt"
	"sync"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/pkg/sandbox"
	"github.com/vmrt/vmrt/pkg/stdio"
)

// process is the host's record of a process in the guest: a container's init
// or an exec. It answers State and Wait without asking the guest, so a guest
// that hangs or lies cannot hold up more than its own requests.
type process struct {
	// id is the exec id, or "" for init.
	id string
	// stdio is what containerd named; it does not change.
	stdio stdio.Config
	// spec is an exec's, as the client wrote it; nil for init.
	spec *specs.Process
	// exited is closed once status and exitedAt are set.
	exited chan struct{}

	mu sync.Mutex
	// state is UNKNOWN until the process was created, then goes
	// CREATED, RUNNING, STOPPED. Pausing is a state of the container.
	state task.Status
	// status and exitedAt are final once state is STOPPED.
	status   uint32
	exitedAt time.Time
	// starting is true from the first Start on, unless that has failed.
	starting bool
	// asked is true once the guest may have been asked to start it; started and
	// exiting say that the guest has announced that much.
	asked, started, exiting bool
	// killed is true once somebody sees to the end that SIGKILL makes.
	killed bool
	// io is nil while the process has no streams.
	io *stdio.IO
	// guest is true once the guest may know the process.
	guest bool
	// width and height are the terminal's size set before Start; 0: none.
	width, height uint32
}

func newProcess(id string, cfg stdio.Config) *process {
	return &process{id: id, stdio: cfg, exited: make(chan struct{})}
}

// setState moves a process that has not stopped to state.
func (p *process) setState(state task.Status) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != task.Status_STOPPED {
		p.state = state
	}
}

// setExited records the end of the process. Only the first call counts; it
// returns true.
func (p *process) setExited(status uint32, at time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == task.Status_STOPPED {
		return false
	}
	p.state, p.status, p.exitedAt = task.Status_STOPPED, status, at
	close(p.exited)
	return true
}

func (p *process) snapshot() (state task.Status, status uint32, exitedAt time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state, p.status, p.exitedAt
}

// beginStart claims the start of a process that was created and not started;
// seen is the state that clients see. One caller only gets nil: a second start
// would count against the first in the guest's task service.
func (p *process) beginStart(seen task.Status) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.state != task.Status_CREATED && seen == task.Status_CREATED:
		seen = p.state // It changed a moment ago.
	case p.state == task.Status_CREATED && p.starting:
		seen = task.Status_RUNNING
	}
	if seen != task.Status_CREATED {
		return fmt.Errorf("cannot start a %s process: %w", stateName(seen), errdefs.ErrFailedPrecondition)
	}
	p.starting, p.asked = true, true
	return nil
}

// startFailed lets an init whose start has failed be started again, as runc
// does; an exec has stopped by then.
func (p *process) startFailed() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.starting = false
}

// wait returns when the process has exited or ctx ends.
func (p *process) wait(ctx context.Context) error {
	select {
	case <-p.exited:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *process) setIO(io *stdio.IO) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.io = io
}

func (p *process) getIO() *stdio.IO {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.io
}

// closeIO drains what the process wrote for as long as ctx allows and closes
// its streams.
func (p *process) closeIO(ctx context.Context) error {
	io := p.getIO()
	if io == nil {
		return nil
	}
	drained := io.Drain(ctx)
	if err := io.Close(); err != nil {
		return err
	}
	return drained
}

// stateName is the word that runc has for a state.
func stateName(s task.Status) string {
	switch s {
	case task.Status_CREATED:
		return "created"
	case task.Status_RUNNING:
		return "running"
	case task.Status_STOPPED:
		return "stopped"
	case task.Status_PAUSED:
		return "paused"
	case task.Status_PAUSING:
		return "pausing"
	default:
		return "not created"
	}
}

// enterGuest notes that the guest is told of the process.
func (p *process) enterGuest() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.guest = true
}

// takeStarted notes that the guest has announced the process's start. It
// reports whether that is news, and can be true.
func (p *process) takeStarted() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.guest || !p.asked || p.started || p.state == statusStopped {
		return false
	}
	p.started, p.state = true, statusRunning
	return true
}

// takeExit is takeStarted for the process's exit.
func (p *process) takeExit() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.guest || p.exiting || p.state == statusStopped {
		return false
	}
	p.exiting = true
	return true
}

// takeKill returns true once.
func (p *process) takeKill() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	taken := !p.killed
	p.killed = true
	return taken
}

func (p *process) inGuest() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.guest
}

// setSize keeps a terminal's size for applySize.
func (p *process) setSize(width, height uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.width, p.height = width, height
}

// applySize gives a started exec the size that was set before its start.
func (p *process) applySize(ctx context.Context, sb *sandbox.Sandbox, container string) {
	p.mu.Lock()
	r := &taskapi.ResizePtyRequest{ID: container, ExecID: p.id, Width: p.width, Height: p.height}
	p.mu.Unlock()
	if r.Width == 0 && r.Height == 0 {
		return
	}
	if _, err := sb.Tasks().ResizePty(ctx, r); err != nil {
		log.G(ctx).WithError(err).WithField("container", container).WithField("exec", p.id).Warn("set size of terminal")
	}
}
