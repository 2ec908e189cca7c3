package task

import (
	"context"
	"encoding/json"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// forward calls the service in its namespace once the ids were checked.
func forward[Req, Resp any](ctx context.Context, id, exec string, call func(context.Context, Req) (Resp, error), r Req) (Resp, error) {
	if _, err := checkProcess(id, exec); err != nil {
		var none Resp
		return none, errgrpc.ToGRPC(err)
	}
	return call(inNamespace(ctx), r)
}

// State says how a process is. Its stdio fields are those of the request that
// made the process.
func (s *Service) State(ctx context.Context, r *taskapi.StateRequest) (*taskapi.StateResponse, error) {
	resp, err := forward(ctx, r.ID, r.ExecID, s.inner.State, r)
	if err != nil {
		return nil, err
	}
	resp.Stdin, resp.Stdout, resp.Stderr = "", "", ""
	if p := s.lookup(key{r.ID, r.ExecID}); p != nil {
		resp.Stdin, resp.Stdout, resp.Stderr = p.urls.Stdin, p.urls.Stdout, p.urls.Stderr
	}
	return resp, nil
}

// CloseIO closes a process's stdin, unless a stream feeds that.
func (s *Service) CloseIO(ctx context.Context, r *taskapi.CloseIORequest) (*emptypb.Empty, error) {
	if p := s.lookup(key{r.ID, r.ExecID}); p != nil && p.urls.Stdin != "" {
		return &emptypb.Empty{}, nil
	}
	return forward(ctx, r.ID, r.ExecID, s.inner.CloseIO, r)
}

// Update changes a container's resources: OCI LinuxResources as JSON.
func (s *Service) Update(ctx context.Context, r *taskapi.UpdateTaskRequest) (*emptypb.Empty, error) {
	if r.Resources == nil || !json.Valid(r.Resources.Value) {
		return nil, errgrpc.ToGRPC(invalid("update container %s: resources are not JSON", r.ID))
	}
	return forward(ctx, r.ID, "", s.inner.Update, r)
}

// Wait returns when a process has ended; its output may still be on its way.
func (s *Service) Wait(ctx context.Context, r *taskapi.WaitRequest) (*taskapi.WaitResponse, error) {
	return forward(ctx, r.ID, r.ExecID, s.inner.Wait, r)
}

// Kill sends a signal.
func (s *Service) Kill(ctx context.Context, r *taskapi.KillRequest) (*emptypb.Empty, error) {
	return forward(ctx, r.ID, r.ExecID, s.inner.Kill, r)
}

// ResizePty sets the size of a terminal.
func (s *Service) ResizePty(ctx context.Context, r *taskapi.ResizePtyRequest) (*emptypb.Empty, error) {
	return forward(ctx, r.ID, r.ExecID, s.inner.ResizePty, r)
}

// Pids lists a container's processes by their pids in the guest.
func (s *Service) Pids(ctx context.Context, r *taskapi.PidsRequest) (*taskapi.PidsResponse, error) {
	return forward(ctx, r.ID, "", s.inner.Pids, r)
}

// Pause freezes a container.
func (s *Service) Pause(ctx context.Context, r *taskapi.PauseRequest) (*emptypb.Empty, error) {
	return forward(ctx, r.ID, "", s.inner.Pause, r)
}

// Resume thaws a container.
func (s *Service) Resume(ctx context.Context, r *taskapi.ResumeRequest) (*emptypb.Empty, error) {
	return forward(ctx, r.ID, "", s.inner.Resume, r)
}

// Stats returns cgroup v2 metrics.
func (s *Service) Stats(ctx context.Context, r *taskapi.StatsRequest) (*taskapi.StatsResponse, error) {
	return forward(ctx, r.ID, "", s.inner.Stats, r)
}

// Connect returns the pids of the agent and of a container's init.
func (s *Service) Connect(ctx context.Context, r *taskapi.ConnectRequest) (*taskapi.ConnectResponse, error) {
	return forward(ctx, r.ID, "", s.inner.Connect, r)
}

// Checkpoint is not implemented: the guest has no CRIU.
func (s *Service) Checkpoint(_ context.Context, r *taskapi.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, errgrpc.ToGRPCf(errdefs.ErrNotImplemented, "checkpoint container %s", r.ID)
}

// Shutdown does nothing: the virtual machine ends with vmrt.agent.v1's.
func (s *Service) Shutdown(context.Context, *taskapi.ShutdownRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}
