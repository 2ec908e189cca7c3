package shim

import (
	"context"
	"encoding/json"
	"fmt"
	"syscall"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/guestspec"
	"github.com/vmrt/vmrt/pkg/sandbox"
	"github.com/vmrt/vmrt/pkg/stdio"
)

// Exec records an additional process of a container. The guest hears of it at
// Start, as its streams are opened then.
func (s *service) Exec(ctx context.Context, r *taskapi.ExecProcessRequest) (*emptypb.Empty, error) {
	if err := s.addExec(r); err != nil {
		return nil, toGRPC(err)
	}
	return empty, nil
}

func (s *service) addExec(r *taskapi.ExecProcessRequest) error {
	if err := api.CheckID(r.ExecID); err != nil {
		return fmt.Errorf("exec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	c, err := s.container(r.ID)
	if err != nil {
		return err
	}
	if err := podOnly(c, "exec in container"); err != nil {
		return err
	}
	switch c.status(c.init) {
	case statusStopped:
		return errdefs.ErrFailedPrecondition.WithMessage("cannot exec in a stopped state")
	case statusPaused, statusPausing:
		return errdefs.ErrFailedPrecondition.WithMessage("cannot exec in a paused state")
	case task.Status_UNKNOWN:
		return fmt.Errorf("container not created: %w", errdefs.ErrFailedPrecondition)
	}
	var spec specs.Process
	if err := json.Unmarshal(r.Spec.GetValue(), &spec); err != nil {
		return fmt.Errorf("exec %s: decode process: %w: %w", r.ExecID, err, errdefs.ErrInvalidArgument)
	}
	p := newProcess(r.ExecID, stdio.Config{
		Namespace: s.namespace, ID: c.id,
		Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal,
		Streaming: s.streaming,
	})
	p.spec = &spec
	if err := c.addExec(p); err != nil {
		return err
	}
	p.setState(statusCreated)
	s.events.send(&eventstypes.TaskExecAdded{ContainerID: c.id, ExecID: p.id})
	return nil
}

// Start runs what Create or Exec made.
func (s *service) Start(ctx context.Context, r *taskapi.StartRequest) (*taskapi.StartResponse, error) {
	defer s.memory.soon()
	c, p, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	if err := p.beginStart(c.status(p)); err != nil {
		return nil, toGRPC(err)
	}
	if err := c.takesExec(p); err != nil {
		p.startFailed()
		return nil, toGRPC(err)
	}
	sb, err := s.guest()
	if err != nil {
		p.startFailed()
		return nil, toGRPC(err)
	}
	ctx, cancel := context.WithTimeout(ctx, createTimeout)
	defer cancel()
	phases := startPhases()
	pid := c.pid()
	if p == c.init {
		err = s.startInit(ctx, sb, c)
	} else {
		err = s.startExec(ctx, sb, c, p)
	}
	if err != nil {
		p.startFailed()
		return nil, toGRPC(err)
	}
	phases.log(ctx, "process started", c.id)
	return &taskapi.StartResponse{Pid: pid}, nil
}

func (s *service) startInit(ctx context.Context, sb *sandbox.Sandbox, c *container) error {
	if s.isFirst(c) {
		// Docker's interface arrives only now.
		if err := sb.UpdateNetwork(ctx); err != nil {
			return err
		}
	}
	if c.isPod {
		s.startPod(c)
	} else {
		// With the interface Docker has started its name server, and names it.
		if err := sb.ServeNames(ctx, nameServers(c.spec)); err != nil {
			return err
		}
		if _, err := sb.Tasks().Start(ctx, &taskapi.StartRequest{ID: c.id}); err != nil {
			return s.guestError(sb, err)
		}
	}
	c.init.setState(statusRunning)
	if err := s.runHooks(ctx, c, specs.StateRunning, hookPoststart); err != nil {
		// As runc does: a container whose poststart hook fails is not kept.
		if _, killErr := s.Kill(ctx, &taskapi.KillRequest{ID: c.id, Signal: uint32(syscall.SIGKILL)}); killErr != nil {
			log.G(ctx).WithError(killErr).WithField("container", c.id).Warn("kill after a failed poststart hook")
		}
		return err
	}
	return nil
}

// startExec makes and starts an exec in the guest. After an error the exec is
// stopped with status 255 as runc's, and waits for its Delete.
func (s *service) startExec(ctx context.Context, sb *sandbox.Sandbox, c *container, p *process) (err error) {
	var io *stdio.IO
	defer func() {
		if err != nil {
			if io != nil {
				io.Close()
			}
			// As with runc, no exit event tells of a process that never was.
			p.setExited(statusNotStarted, time.Now())
		}
	}()
	if io, err = stdio.Open(ctx, p.stdio); err != nil {
		return err
	}
	p.setIO(io)
	spec, warnings, err := guestspec.RewriteProcess(p.spec)
	if err != nil {
		return fmt.Errorf("exec %s: %w", p.id, err)
	}
	for _, w := range warnings {
		log.G(ctx).WithField("container", c.id).WithField("exec", p.id).Warn(w)
	}
	encoded, err := typeurl.MarshalAnyToProto(spec)
	if err != nil {
		return err
	}
	names, err := s.attach(ctx, sb, io)
	if err != nil {
		return err
	}
	p.enterGuest()
	_, err = sb.Tasks().Exec(ctx, &taskapi.ExecProcessRequest{
		ID: c.id, ExecID: p.id, Terminal: p.stdio.Terminal,
		Stdin: names.stdin, Stdout: names.stdout, Stderr: names.stderr,
		Spec: encoded,
	})
	if err != nil {
		return s.guestError(sb, err)
	}
	if _, err := sb.Tasks().Start(ctx, &taskapi.StartRequest{ID: c.id, ExecID: p.id}); err != nil {
		return s.guestError(sb, err)
	}
	p.setState(statusRunning)
	p.applySize(ctx, sb, c.id)
	return nil
}
