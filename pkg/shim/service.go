// Package shim is the host side of a pod towards containerd: the manager that
// containerd starts it through, and containerd.task.v3 for the containers of
// one sandbox.
//
// The service keeps a record of every process on the host and forwards to the
// guest what only the guest can do. State, Pids, Wait and Connect never ask the
// guest. Every other request to the guest has a deadline. All methods may be
// called concurrently.
package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	containerdshim "github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/loglimit"
	"github.com/vmrt/vmrt/pkg/sandbox"
	"github.com/vmrt/vmrt/pkg/streaming"
)

// Deadlines of requests to the guest, and of what the shim does on its own.
const (
	// guestTimeout is for requests that an agent answers at once.
	guestTimeout = 10 * time.Second
	// createTimeout is for requests that start the OCI runtime in the guest.
	createTimeout = 2 * time.Minute
	// drainTimeout is how long Delete waits for output that a client does not
	// read, as runc's shim does.
	drainTimeout = 10 * time.Second
	// killTime is how long a container may take to end after SIGKILL. CRI waits
	// for two minutes, and cannot end a pod whose containers have not.
	killTime = time.Minute
	// stopTimeout is for the end of the virtual machine and its remains.
	stopTimeout = 20 * time.Second
	// statusKilled is the exit status of what a SIGKILL ended.
	statusKilled = 128 + 9
	// statusNotStarted is the exit status of an exec that could not start.
	statusNotStarted = 255
)

var empty = &emptypb.Empty{}

// service is the task service of one sandbox.
type service struct {
	// ctx carries the logger and containerd's namespace.
	ctx       context.Context
	namespace string
	events    *eventQueue
	shutdown  shutdown.Service
	// socket is the path of the shim's own.
	socket string
	// streaming has the streams that clients open on the shim's socket.
	streaming *streaming.Service
	memory    trimmer

	// saving is held by saveState, and taken before mu.
	saving sync.Mutex

	mu         sync.Mutex
	containers map[string]*container
	// abandoned is true once Shutdown has found nothing that keeps the shim.
	abandoned bool
	// sandbox is nil until the first Create or CreateSandbox; pod is what it
	// was made for.
	sandbox *sandbox.Sandbox
	pod     *podConfig
	// api is nil unless the sandbox was made by CreateSandbox.
	api *apiSandbox
	// booted is closed when the sandbox's boot has ended, with bootErr set;
	// nil until that was begun.
	booted  chan struct{}
	bootErr error

	// streams numbers stream connections, so that no name comes twice.
	streams atomic.Uint64
}

var (
	_ taskapi.TTRPCTaskService       = (*service)(nil)
	_ sandboxapi.TTRPCSandboxService = (*service)(nil)
	_ containerdshim.TTRPCService    = (*service)(nil)
)

// newService returns the service of a shim that is reached by a socket.
func newService(ctx context.Context, publisher containerdshim.Publisher, sd shutdown.Service, socket string) (*service, error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, err
	}
	// Much of the log is about what the guest does.
	logger := log.G(ctx).Logger
	logger.SetOutput(loglimit.New(logger.Out))
	s := &service{
		ctx:        ctx,
		namespace:  ns,
		events:     newEventQueue(ctx, publisher),
		shutdown:   sd,
		streaming:  streaming.New(socket),
		socket:     socket,
		containers: map[string]*container{},
	}
	sd.RegisterCallback(func(ctx context.Context) error {
		return errors.Join(s.stopSandbox(ctx), s.events.close(ctx))
	})
	return s, nil
}

// RegisterTTRPC makes the services reachable.
func (s *service) RegisterTTRPC(server *ttrpc.Server) error {
	taskapi.RegisterTTRPCTaskService(server, s)
	sandboxapi.RegisterTTRPCSandboxService(server, s)
	s.streaming.Register(server)
	return nil
}

// lookup returns the container or nil.
func (s *service) lookup(id string) *container {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.containers[id]
}

// container returns a container that was created. One that is still being
// created is not there for clients, as with runc: a containerd that has just
// started would else delete it meanwhile.
func (s *service) container(id string) (*container, error) {
	if c := s.lookup(id); c != nil {
		if state, _, _ := c.init.snapshot(); state != task.Status_UNKNOWN {
			return c, nil
		}
	}
	return nil, fmt.Errorf("container not created: %w", errdefs.ErrNotFound)
}

// isFirst reports whether the sandbox was made for this container.
func (s *service) isFirst(c *container) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sandbox != nil && s.sandbox.ID() == c.id
}

// find returns a container and one of its processes.
func (s *service) find(id, execID string) (*container, *process, error) {
	c, err := s.container(id)
	if err != nil {
		return nil, nil, err
	}
	p, err := c.process(execID)
	return c, p, err
}

// guest returns the sandbox if its virtual machine is up.
func (s *service) guest() (*sandbox.Sandbox, error) {
	s.mu.Lock()
	sb, booted, bootErr := s.sandbox, s.booted, s.bootErr
	s.mu.Unlock()
	if sb == nil || booted == nil || bootErr != nil {
		return nil, fmt.Errorf("no virtual machine: %w", errdefs.ErrUnavailable)
	}
	select {
	case <-booted:
	default:
		return nil, fmt.Errorf("virtual machine is starting: %w", errdefs.ErrUnavailable)
	}
	return sb, alive(sb)
}

// State returns what is known of a process.
func (s *service) State(ctx context.Context, r *taskapi.StateRequest) (*taskapi.StateResponse, error) {
	c, p, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	_, status, exitedAt := p.snapshot()
	resp := &taskapi.StateResponse{
		ID: c.id, Bundle: c.bundle, Pid: c.pid(), ExecID: r.ExecID,
		Status: c.status(p), ExitStatus: status,
		Stdin: p.stdio.Stdin, Stdout: p.stdio.Stdout, Stderr: p.stdio.Stderr, Terminal: p.stdio.Terminal,
	}
	if r.ExecID != "" {
		resp.ID = r.ExecID
	}
	if !exitedAt.IsZero() {
		resp.ExitedAt = timestamppb.New(exitedAt)
	}
	return resp, nil
}

// Pids returns the host process that stands for the container. The guest's own
// pids mean nothing on the host and never leave it.
//
// A container that has ended is an error, and not an empty list: containerd,
// when it has started again, takes the empty list for a shim that nobody needs
// and deletes the container, and with it the exit status that nobody has heard
// of yet (core/runtime/v2/shim_load.go, shouldCleanupShim).
func (s *service) Pids(ctx context.Context, r *taskapi.PidsRequest) (*taskapi.PidsResponse, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, toGRPC(err)
	}
	if state, _, _ := c.init.snapshot(); state == statusStopped {
		return nil, toGRPC(fmt.Errorf("processes of container %s: it has ended: %w", c.id, errdefs.ErrFailedPrecondition))
	}
	return &taskapi.PidsResponse{Processes: []*task.ProcessInfo{{Pid: c.pid()}}}, nil
}

// Connect returns the shim's pid and the container's.
func (s *service) Connect(ctx context.Context, r *taskapi.ConnectRequest) (*taskapi.ConnectResponse, error) {
	resp := &taskapi.ConnectResponse{ShimPid: uint32(os.Getpid())}
	if c := s.lookup(r.ID); c != nil {
		resp.TaskPid = c.pid()
	}
	return resp, nil
}

// Wait returns when the process has exited, whether or not its output was read.
func (s *service) Wait(ctx context.Context, r *taskapi.WaitRequest) (*taskapi.WaitResponse, error) {
	_, p, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	if err := p.wait(ctx); err != nil {
		return nil, toGRPC(err)
	}
	_, status, exitedAt := p.snapshot()
	return &taskapi.WaitResponse{ExitStatus: status, ExitedAt: timestamppb.New(exitedAt)}, nil
}

// Checkpoint cannot be done: CRIU inside the guest would save state that only
// this virtual machine can restore.
func (s *service) Checkpoint(ctx context.Context, r *taskapi.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, toGRPC(fmt.Errorf("checkpoint container %s: not supported in a virtual machine: %w", r.ID, errdefs.ErrNotImplemented))
}

// Shutdown ends the sandbox and the shim once no container is left. A container
// that is still being created does not keep them: nobody waits for it any more.
func (s *service) Shutdown(ctx context.Context, r *taskapi.ShutdownRequest) (*emptypb.Empty, error) {
	creating, stays := s.abandon()
	if stays {
		return empty, nil
	}
	// containerd runs `shim delete` once this has returned: by then nothing
	// shall be left for it.
	phases := startPhases()
	if err := s.awaitCreates(ctx, creating); err != nil {
		log.G(ctx).WithError(err).Error("shut down")
	}
	if err := s.stopSandbox(ctx); err != nil {
		log.G(ctx).WithError(err).Error("stop sandbox")
	} else {
		phases.log(ctx, "sandbox stopped", r.ID)
	}
	s.shutdown.Shutdown()
	return empty, nil
}

// abandon reports whether there is something that keeps the shim. If not, it
// returns the containers that are being created; from now on none can be.
func (s *service) abandon() (creating []*container, stays bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.api != nil && !s.api.isShutDown() {
		return nil, true
	}
	for _, c := range s.containers {
		if state, _, _ := c.init.snapshot(); state != task.Status_UNKNOWN {
			return nil, true
		}
		creating = append(creating, c)
	}
	s.abandoned = true
	return creating, false
}

// errAbandoned is the end of what is created in a shim that is shut down.
var errAbandoned = fmt.Errorf("the shim is being shut down: %w", errdefs.ErrUnavailable)

// awaitCreates ends the creation of containers and waits for its rollback.
func (s *service) awaitCreates(ctx context.Context, creating []*container) error {
	if len(creating) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	for _, c := range creating {
		c.cancel(errAbandoned)
	}
	for _, c := range creating {
		select {
		case <-c.settled:
		case <-ctx.Done():
			return fmt.Errorf("wait for the end of the creation of container %s: %w", c.id, ctx.Err())
		}
	}
	return nil
}

// stopSandbox ends the virtual machine, if there is one. Idempotent.
func (s *service) stopSandbox(ctx context.Context) error {
	s.mu.Lock()
	sb, booted := s.sandbox, s.booted
	s.mu.Unlock()
	if sb == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	return endSandbox(ctx, sb, booted)
}

// endSandbox ends a sandbox that may still be booting; booted is nil if it has
// not begun to.
func endSandbox(ctx context.Context, sb *sandbox.Sandbox, booted <-chan struct{}) error {
	// Boot must have returned before Stop; a dead machine ends it at once.
	if err := sb.Kill(ctx, nil); err != nil {
		log.G(ctx).WithError(err).Warn("kill virtual machine")
	}
	if booted != nil {
		select {
		case <-booted:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return sb.Stop(ctx)
}

// killMachine ends a virtual machine that nobody waits for the end of.
func (s *service) killMachine(sb *sandbox.Sandbox, why error) {
	ctx, cancel := context.WithTimeout(s.ctx, stopTimeout)
	defer cancel()
	if err := sb.Kill(ctx, why); err != nil {
		log.G(ctx).WithError(err).Error("kill virtual machine")
	}
}

// follow takes the guest's events until the virtual machine has ended, and then
// lets every process exit that still had not.
func (s *service) follow(sb *sandbox.Sandbox) {
	err := sb.Events(s.ctx, func(ev *api.Event) { s.guestEvent(s.ctx, ev) })
	// The stream breaks a moment before the end of its machine is noticed, which
	// says more.
	timer := time.NewTimer(deathNotice)
	defer timer.Stop()
	select {
	case <-sb.Dead():
	case <-s.ctx.Done():
		return
	case <-timer.C:
		s.killMachine(sb, err)
	}
	if err := sb.Err(); err != nil {
		log.G(s.ctx).WithError(err).Error("virtual machine ended")
	}
	s.mu.Lock()
	all := make([]*container, 0, len(s.containers))
	for _, c := range s.containers {
		all = append(all, c)
	}
	s.mu.Unlock()
	now := time.Now()
	for _, c := range all {
		for _, p := range c.processes() {
			if state, _, _ := p.snapshot(); state != task.Status_UNKNOWN {
				s.exited(c, p, statusKilled, now)
			}
		}
	}
	s.sandboxEnded(now)
}
