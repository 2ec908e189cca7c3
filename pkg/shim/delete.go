package shim

import (
	"context"
	"errors"
	"fmt"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmrt/vmrt/api"
)

// Delete removes an exec, or a container with all that belongs to it.
func (s *service) Delete(ctx context.Context, r *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	defer s.memory.soon()
	c, p, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	if p == c.init {
		err = s.deleteContainer(ctx, c)
	} else {
		err = s.deleteExec(ctx, c, p)
	}
	if err != nil {
		return nil, toGRPC(err)
	}
	_, status, exitedAt := p.snapshot()
	resp := &taskapi.DeleteResponse{ExitStatus: status, Pid: c.pid()}
	if !exitedAt.IsZero() {
		resp.ExitedAt = timestamppb.New(exitedAt)
	}
	return resp, nil
}

func (s *service) deleteExec(ctx context.Context, c *container, p *process) error {
	state, _, _ := p.snapshot()
	if state == statusRunning {
		return fmt.Errorf("cannot delete a running process: %w", errdefs.ErrFailedPrecondition)
	}
	s.drain(ctx, c, p, func(ctx context.Context) error {
		sb, err := s.guest()
		if err != nil || !p.inGuest() {
			return err
		}
		_, err = sb.Tasks().Delete(ctx, &taskapi.DeleteRequest{ID: c.id, ExecID: p.id})
		return err
	})
	c.removeExec(p.id)
	return nil
}

// drain lets the guest delete a process, which flushes its output, and waits
// for the client to have read it, for at most drainTimeout together. What goes
// wrong is logged: the process is gone either way.
func (s *service) drain(ctx context.Context, c *container, p *process, remove func(context.Context) error) {
	logger := log.G(ctx).WithFields(log.Fields{"container": c.id, "exec": p.id})
	// The guest gives up on output after drainTimeout, and answers then.
	gctx, cancel := context.WithTimeout(ctx, drainTimeout+guestTimeout)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- remove(gctx) }()

	dctx, cancelDrain := context.WithTimeout(ctx, drainTimeout)
	defer cancelDrain()
	var drained error
	if io := p.getIO(); io != nil {
		drained = io.Drain(dctx)
	}
	if err := p.closeIO(dctx); err != nil || drained != nil {
		logger.WithError(errors.Join(drained, err)).Warn("not all output was read")
	}
	if err := <-done; err != nil && !errdefs.IsNotFound(errgrpc.ToNative(err)) && !errdefs.IsUnavailable(errgrpc.ToNative(err)) {
		logger.WithError(err).Warn("delete process in guest")
	}
}

func (s *service) deleteContainer(ctx context.Context, c *container) error {
	switch state := c.status(c.init); state {
	case statusRunning, statusPaused, statusPausing:
		return fmt.Errorf("cannot delete a %s process: %w", stateName(state), errdefs.ErrFailedPrecondition)
	case statusCreated:
		if err := s.killCreated(ctx, c); err != nil {
			return err
		}
	}
	if !c.beginDelete() {
		return fmt.Errorf("container %s is being deleted: %w", c.id, errdefs.ErrUnavailable)
	}
	defer c.endDelete()
	phases := startPhases()

	for _, p := range c.processes() {
		if p != c.init {
			_ = p.closeIO(canceled)
		}
	}
	s.drain(ctx, c, c.init, func(ctx context.Context) error {
		sb, err := s.guest()
		if err != nil || c.isPod {
			return err
		}
		if _, err := sb.Tasks().Delete(ctx, &taskapi.DeleteRequest{ID: c.id}); err != nil {
			return err
		}
		_, err = sb.Agent().RemoveBundle(ctx, &api.RemoveBundleRequest{Id: c.id})
		return err
	})
	phases.end("guest")
	c.releasePid()
	if err := c.removeFiles(); err != nil {
		return fmt.Errorf("delete container %s: %w", c.id, err)
	}
	s.runPoststop(ctx, c)
	s.forget(c)
	s.saveState()
	phases.end("host")
	phases.log(ctx, "container deleted", c.id)
	_, status, exitedAt := c.init.snapshot()
	s.events.send(&eventstypes.TaskDelete{
		ContainerID: c.id, Pid: c.pid(), ExitStatus: status, ExitedAt: timestamppb.New(exitedAt),
	})
	return nil
}

// canceled is for what must not wait.
var canceled = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// killCreated ends a container that was never started, which may be deleted
// without a Kill before it.
func (s *service) killCreated(ctx context.Context, c *container) error {
	ctx, cancel := context.WithTimeout(ctx, guestTimeout)
	defer cancel()
	_, err := s.Kill(ctx, &taskapi.KillRequest{ID: c.id, Signal: statusKilled - 128, All: true})
	if err != nil && !errdefs.IsNotFound(errgrpc.ToNative(err)) && !errdefs.IsUnavailable(errgrpc.ToNative(err)) {
		return err
	}
	if err := c.init.wait(ctx); err != nil {
		// An unreachable guest has no process any more.
		s.exited(c, c.init, statusKilled, time.Now())
	}
	return nil
}
