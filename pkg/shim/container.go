package shim

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/pkg/anchor"
)

const (
	statusCreated = task.Status_CREATED
	statusRunning = task.Status_RUNNING
	statusPaused  = task.Status_PAUSED
	statusPausing = task.Status_PAUSING
	statusStopped = task.Status_STOPPED
)

// container is the host's record of one container.
type container struct {
	id     string
	bundle string
	// spec is as containerd wrote it; read only.
	spec *specs.Spec
	init *process
	// known is closed once requests about the container are answered, settled
	// when Create has ended, with its rollback.
	known, settled chan struct{}
	// cancel ends Create.
	cancel context.CancelCauseFunc
	// isPod is true for the container by which CRI names a pod, whose process
	// the virtual machine is in place of.
	isPod bool
	// rootfs is the root file system's path in the share; set by Create.
	rootfs string
	// removeFiles removes what the container has in the shared folder; set by
	// Create. Idempotent.
	removeFiles func() error
	// volumes are the container's bind mounts on the host; set by Create.
	volumes []anchor.Bind

	mu sync.Mutex
	// anchor is the host process whose pid stands for the container, until
	// init has exited.
	anchor *anchor.Anchor
	// lastPid is what anchor's pid was, for messages after its end.
	lastPid uint32
	execs   map[string]*process
	// pausing is "", or the state that Pause has put the container into.
	pausing task.Status
	// guest is init's pid in the guest; 0 until it was created.
	guest uint32
	// deleting is true while a Delete of init runs.
	deleting bool
	// lastOOM is when the guest's last out-of-memory event was passed on.
	lastOOM time.Time
}

// pid returns the host pid that stands for the container's processes.
func (c *container) pid() uint32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lastPid
}

// guestPid returns init's pid in the guest, or 0.
func (c *container) guestPid() uint32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.guest
}

func (c *container) setGuestPid(pid uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.guest = pid
}

func (c *container) setAnchor(a *anchor.Anchor) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.anchor, c.lastPid = a, uint32(a.Pid())
}

// currentAnchor returns nil once init has exited.
func (c *container) currentAnchor() *anchor.Anchor {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.anchor
}

// releasePid ends the anchor. Idempotent.
func (c *container) releasePid() {
	c.mu.Lock()
	a := c.anchor
	c.anchor = nil
	c.mu.Unlock()
	if a != nil {
		a.Close()
	}
}

func (c *container) exec(id string) *process {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.execs[id]
}

// process returns init for "" and the exec otherwise.
func (c *container) process(execID string) (*process, error) {
	if execID == "" {
		return c.init, nil
	}
	if p := c.exec(execID); p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("process does not exist %s: %w", execID, errdefs.ErrNotFound)
}

// addExec records an exec, which must be new.
func (c *container) addExec(p *process) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.execs[p.id]; ok {
		return fmt.Errorf("id %s: %w", p.id, errdefs.ErrAlreadyExists)
	}
	c.execs[p.id] = p
	return nil
}

func (c *container) removeExec(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.execs, id)
}

// processes returns init and all execs.
func (c *container) processes() []*process {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := []*process{}
	for _, p := range c.execs {
		all = append(all, p)
	}
	return append(all, c.init)
}

// beginPause notes that the container is being paused, and returns what was
// noted before.
func (c *container) beginPause() (before task.Status) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before, c.pausing = c.pausing, statusPausing
	return before
}

// setPausing notes the container's pause state; task.Status_UNKNOWN for none.
func (c *container) setPausing(state task.Status) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pausing = state
}

// status returns the state that containerd sees of p: a paused container's
// processes are all paused.
func (c *container) status(p *process) task.Status {
	state, _, _ := p.snapshot()
	c.mu.Lock()
	defer c.mu.Unlock()
	if state == statusRunning && c.pausing != task.Status_UNKNOWN {
		return c.pausing
	}
	return state
}

// takesExec returns an error in runc's words if the exec p cannot be started
// now. It may be later.
func (c *container) takesExec(p *process) error {
	if p == c.init {
		return nil
	}
	switch c.status(c.init) {
	case statusStopped:
		return fmt.Errorf("container %s init process is not running: %w", c.id, errdefs.ErrFailedPrecondition)
	case statusPaused, statusPausing:
		return fmt.Errorf("OCI runtime exec failed: exec failed: cannot exec in a paused container: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}

// oomInterval is the least time between two out-of-memory events of a container:
// the guest can announce as many as it likes.
const oomInterval = time.Second

// takeOOM reports whether an out-of-memory event is to be passed on.
func (c *container) takeOOM(now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.lastOOM.IsZero() && now.Sub(c.lastOOM) < oomInterval {
		return false
	}
	c.lastOOM = now
	return true
}

// beginDelete returns false when a Delete of the container runs already.
func (c *container) beginDelete() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.deleting {
		return false
	}
	c.deleting = true
	return true
}

func (c *container) endDelete() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deleting = false
}
