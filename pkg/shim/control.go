package shim

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	cgroup2stats "github.com/containerd/cgroups/v3/cgroup2/stats"
	eventstypes "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmrt/vmrt/pkg/anchor"
	"github.com/vmrt/vmrt/pkg/guestspec"
	"github.com/vmrt/vmrt/pkg/sandbox"
)

// ask forwards one request about a container to the guest, with a deadline.
func (s *service) ask(ctx context.Context, what, id string, call func(context.Context, *sandbox.Sandbox, *container) error) error {
	c, err := s.container(id)
	if err != nil {
		return toGRPC(err)
	}
	if err := podOnly(c, what); err != nil {
		return toGRPC(err)
	}
	sb, err := s.guest()
	if err != nil {
		return toGRPC(err)
	}
	ctx, cancel := context.WithTimeout(ctx, guestTimeout)
	defer cancel()
	if err := call(ctx, sb, c); err != nil {
		return toGRPC(s.guestError(sb, err))
	}
	return nil
}

// Kill sends a signal to a process, or to all of a container's.
func (s *service) Kill(ctx context.Context, r *taskapi.KillRequest) (*emptypb.Empty, error) {
	c, p, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	// Others of the container's processes may be left, unless the virtual
	// machine has ended as well.
	_, dead := s.guest()
	switch state, _, _ := p.snapshot(); {
	case state == statusStopped && (!r.All || p != c.init || dead != nil):
		return nil, toGRPC(fmt.Errorf("process already finished: %w", errdefs.ErrNotFound))
	case state == task.Status_UNKNOWN:
		return nil, toGRPC(fmt.Errorf("process not created: %w", errdefs.ErrFailedPrecondition))
	case state == statusCreated && p != c.init:
		return nil, toGRPC(fmt.Errorf("process not created: %w", errdefs.ErrFailedPrecondition))
	}
	if c.isPod {
		s.killPod(ctx, c, syscall.Signal(r.Signal))
		return empty, nil
	}
	err = s.ask(ctx, "kill container", r.ID, func(ctx context.Context, sb *sandbox.Sandbox, c *container) error {
		_, err := sb.Tasks().Kill(ctx, &taskapi.KillRequest{ID: r.ID, ExecID: r.ExecID, Signal: r.Signal, All: r.All})
		if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) && r.Signal == uint32(syscall.SIGKILL) && p == c.init {
			// SIGKILL must work. A guest that cannot do it is beyond repair.
			log.G(ctx).WithField("container", c.id).Error("guest does not answer to SIGKILL: ending its virtual machine")
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
			defer cancel()
			return sb.Kill(ctx, errors.New("guest did not answer to SIGKILL"))
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if r.Signal == uint32(syscall.SIGKILL) && p == c.init {
		s.mustEnd(c)
	}
	return empty, nil
}

// mustEnd sees to it that a container which was sent SIGKILL ends: clients wait
// for it, and a guest can keep silent. Where it does not end in killTime, the
// virtual machine does.
func (s *service) mustEnd(c *container) {
	sb, err := s.guest()
	if err != nil || !c.init.takeKill() {
		return
	}
	go func() {
		timer := time.NewTimer(killTime)
		defer timer.Stop()
		select {
		case <-c.init.exited:
			return
		case <-sb.Dead():
			return
		case <-s.ctx.Done():
			return
		case <-timer.C:
		}
		cause := fmt.Errorf("container %s did not end within %s of SIGKILL", c.id, killTime)
		log.G(s.ctx).WithError(cause).Error("ending the virtual machine")
		s.killMachine(sb, cause)
	}()
}

// watchAnchor passes a signal that somebody on the host has ended the
// container's host process with on to the container, as it would be with runc.
func (s *service) watchAnchor(c *container, a *anchor.Anchor) {
	<-a.Done()
	if c.currentAnchor() != a {
		return // it was ended here
	}
	_, err := s.Kill(s.ctx, &taskapi.KillRequest{ID: c.id, Signal: uint32(a.Signal())})
	if err != nil {
		log.G(s.ctx).WithError(err).WithField("container", c.id).Warn("pass on a signal to the container's host process")
	}
}

// Pause freezes the container.
func (s *service) Pause(ctx context.Context, r *taskapi.PauseRequest) (*emptypb.Empty, error) {
	err := s.ask(ctx, "pause container", r.ID, func(ctx context.Context, sb *sandbox.Sandbox, c *container) error {
		before := c.beginPause()
		if _, err := sb.Tasks().Pause(ctx, &taskapi.PauseRequest{ID: r.ID}); err != nil {
			// A container that is paused already stays so.
			c.setPausing(before)
			return err
		}
		c.setPausing(statusPaused)
		s.events.send(&eventstypes.TaskPaused{ContainerID: c.id})
		return nil
	})
	if err != nil {
		return nil, err
	}
	return empty, nil
}

// Resume thaws the container.
func (s *service) Resume(ctx context.Context, r *taskapi.ResumeRequest) (*emptypb.Empty, error) {
	err := s.ask(ctx, "resume container", r.ID, func(ctx context.Context, sb *sandbox.Sandbox, c *container) error {
		if _, err := sb.Tasks().Resume(ctx, &taskapi.ResumeRequest{ID: r.ID}); err != nil {
			return err
		}
		c.setPausing(task.Status_UNKNOWN)
		s.events.send(&eventstypes.TaskResumed{ContainerID: c.id})
		return nil
	})
	if err != nil {
		return nil, err
	}
	return empty, nil
}

// ResizePty sets the size of a process's terminal.
func (s *service) ResizePty(ctx context.Context, r *taskapi.ResizePtyRequest) (*emptypb.Empty, error) {
	_, p, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	if state, _, _ := p.snapshot(); state == statusStopped && !p.stdio.Terminal && r.ExecID == "" {
		return empty, nil // As runc: nothing to size.
	} else if state == statusStopped {
		return nil, toGRPC(errors.New("cannot resize a stopped container"))
	} else if state == statusCreated && r.ExecID != "" {
		// The guest does not know the exec yet. Its size is sent with Start.
		p.setSize(r.Width, r.Height)
		return empty, nil
	}
	err = s.ask(ctx, "resize terminal of container", r.ID, func(ctx context.Context, sb *sandbox.Sandbox, _ *container) error {
		_, err := sb.Tasks().ResizePty(ctx, &taskapi.ResizePtyRequest{ID: r.ID, ExecID: r.ExecID, Width: r.Width, Height: r.Height})
		return err
	})
	if err != nil {
		return nil, err
	}
	return empty, nil
}

// CloseIO ends a process's stdin after what is in its FIFO.
func (s *service) CloseIO(ctx context.Context, r *taskapi.CloseIORequest) (*emptypb.Empty, error) {
	_, p, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	if io := p.getIO(); io != nil && r.Stdin {
		if err := io.CloseStdin(); err != nil {
			return nil, toGRPC(fmt.Errorf("close stdin: %w", err))
		}
	}
	return empty, nil
}

// Update changes the container's resource limits in the guest.
func (s *service) Update(ctx context.Context, r *taskapi.UpdateTaskRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, toGRPC(err)
	}
	resources, warnings, err := rewriteUpdate(r.Resources)
	if err != nil {
		return nil, toGRPC(fmt.Errorf("update container %s: %w", c.id, err))
	}
	for _, w := range warnings {
		log.G(ctx).WithField("container", c.id).Warn(w)
	}
	err = s.ask(ctx, "update container", r.ID, func(ctx context.Context, sb *sandbox.Sandbox, c *container) error {
		_, err := sb.Tasks().Update(ctx, &taskapi.UpdateTaskRequest{ID: r.ID, Resources: resources})
		return err
	})
	if err != nil {
		return nil, err
	}
	return empty, nil
}

// rewriteUpdate makes an update's resources the guest's.
func rewriteUpdate(encoded *anypb.Any) (_ *anypb.Any, warnings []string, err error) {
	var wanted specs.LinuxResources
	if err := typeurl.UnmarshalTo(encoded, &wanted); err != nil {
		return nil, nil, fmt.Errorf("decode resources: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	resources, warnings, err := guestspec.RewriteResources(&wanted)
	if err != nil {
		return nil, nil, err
	}
	out, err := typeurl.MarshalAnyToProto(resources)
	return out, warnings, err
}

// Stats returns the container's cgroup v2 metrics as the guest counts them; for
// the container of a pod, the pod's as the host does.
func (s *service) Stats(ctx context.Context, r *taskapi.StatsRequest) (*taskapi.StatsResponse, error) {
	if c, err := s.container(r.ID); err == nil && c.isPod {
		return s.podStats(c)
	}
	resp := &taskapi.StatsResponse{}
	err := s.ask(ctx, "metrics of container", r.ID, func(ctx context.Context, sb *sandbox.Sandbox, c *container) error {
		got, err := sb.Tasks().Stats(ctx, &taskapi.StatsRequest{ID: r.ID})
		if err != nil {
			return err
		}
		// Decoded and encoded again, so that no other type reaches containerd.
		metrics := &cgroup2stats.Metrics{}
		if err := typeurl.UnmarshalTo(got.GetStats(), metrics); err != nil {
			return fmt.Errorf("decode guest's metrics: %w", err)
		}
		resp.Stats, err = typeurl.MarshalAnyToProto(metrics)
		return err
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}
