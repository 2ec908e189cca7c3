package shim

import (
	"context"
	"fmt"
	"syscall"
	"time"

	cgroup2stats "github.com/containerd/cgroups/v3/cgroup2/stats"
	eventstypes "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/sandbox"
)

// In containerd's podsandbox mode a pod comes as a container, whose only
// process, pause, keeps the pod's namespaces. Here the virtual machine does
// that, so nothing is run for it in the guest: the container has a record and
// its host process, and ends when it is told to.

// startPod starts the container of a pod.
func (s *service) startPod(c *container) {
	s.events.send(&eventstypes.TaskStart{ContainerID: c.id, Pid: c.pid()})
}

// killPod is a signal to the container of a pod. It does as pause does: SIGINT
// and SIGTERM end it with status 0, and what it does not handle does nothing
// to the first process of a pid namespace.
func (s *service) killPod(ctx context.Context, c *container, signal syscall.Signal) {
	var status uint32
	switch signal {
	case syscall.SIGKILL:
		status = statusKilled
	case syscall.SIGINT, syscall.SIGTERM:
	default:
		return
	}
	// Containers that share the pod's pid namespace end with it.
	if sb, err := s.guest(); err == nil {
		ctx, cancel := context.WithTimeout(ctx, guestTimeout)
		defer cancel()
		if _, err := sb.Agent().ClosePod(ctx, &api.Empty{}); err != nil {
			log.G(ctx).WithError(err).WithField("sandbox", c.id).Warn("end the pod's processes")
		}
	}
	s.exited(c, c.init, status, time.Now())
}

// podOnly returns the error of a request that needs a process in the guest,
// for the container of a pod.
func podOnly(c *container, what string) error {
	if !c.isPod {
		return nil
	}
	return fmt.Errorf("%s %s: it is a pod, whose virtual machine has no process for it: %w", what, c.id, errdefs.ErrNotImplemented)
}

// podStats answers Stats for the container of a pod.
func (s *service) podStats(c *container) (*taskapi.StatsResponse, error) {
	sb, err := s.guest()
	if err != nil {
		return nil, toGRPC(err)
	}
	if state, _, _ := c.init.snapshot(); state == statusStopped {
		return nil, toGRPC(fmt.Errorf("metrics of container %s: it has ended: %w", c.id, errdefs.ErrNotFound))
	}
	stats, err := podMetrics(sb)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &taskapi.StatsResponse{Stats: stats}, nil
}

// podMetrics are what the host counts for the pod: its virtual machine and the
// processes that serve it.
func podMetrics(sb *sandbox.Sandbox) (*anypb.Any, error) {
	st, err := sb.Cgroup().Stats()
	if err != nil {
		return nil, fmt.Errorf("read the pod's cgroup: %w", err)
	}
	return typeurl.MarshalAnyToProto(&cgroup2stats.Metrics{
		Pids: &cgroup2stats.PidsStat{Current: st.Pids},
		CPU: &cgroup2stats.CPUStat{
			UsageUsec:  uint64(st.CPUTotal.Microseconds()),
			UserUsec:   uint64(st.CPUUser.Microseconds()),
			SystemUsec: uint64(st.CPUSystem.Microseconds()),
		},
		Memory: &cgroup2stats.MemoryStat{
			Usage: st.Memory, UsageLimit: st.MemoryLimit, InactiveFile: st.MemoryInactiveFile,
		},
	})
}
