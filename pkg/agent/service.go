package agent

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/agent/clock"
	"github.com/vmrt/vmrt/pkg/agent/cpu"
	"github.com/vmrt/vmrt/pkg/agent/device"
	"github.com/vmrt/vmrt/pkg/agent/events"
	"github.com/vmrt/vmrt/pkg/agent/fsmount"
	"github.com/vmrt/vmrt/pkg/agent/names"
	"github.com/vmrt/vmrt/pkg/agent/network"
	"github.com/vmrt/vmrt/pkg/agent/pod"
)

// service is vmrt.agent.v1.Agent. Its methods may be called concurrently.
type service struct {
	events   *events.Queue
	pod      *pod.Pod
	powerOff func()

	network network.Network

	hostPort uint32
	names    *names.Server
	booted   <-chan struct{} // closed when the machine is complete
	mirrorMu sync.Mutex      // for as long as ports are mirrored

	cpuMu sync.Mutex // for the whole of a change of CPUs
}

var _ api.AgentService = (*service)(nil)

// recoverPanic turns a panic of one request into its error.
func recoverPanic(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (resp any, err error) {
	defer func() {
		if v := recover(); v != nil {
			log.L.Errorf("%s: panic: %v\n%s", info.FullMethod, v, debug.Stack())
			resp, err = nil, errgrpc.ToGRPCf(errdefs.ErrInternal, "%s: panic: %v", info.FullMethod, v)
		}
	}()
	return method(ctx, unmarshal)
}

// createAfter holds containers back until booted is closed.
func createAfter(booted <-chan struct{}) ttrpc.UnaryServerInterceptor {
	return func(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
		if strings.HasSuffix(info.FullMethod, "/Create") {
			select {
			case <-booted:
			case <-ctx.Done():
				return nil, errgrpc.ToGRPC(ctx.Err())
			}
		}
		return method(ctx, unmarshal)
	}
}

// done is the answer of calls that return nothing.
func done(err error) (*api.Empty, error) {
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &api.Empty{}, nil
}

func (s *service) Clock(_ context.Context, r *api.ClockRequest) (*api.ClockResponse, error) {
	err := clock.Step(time.Duration(r.StepNs))
	if err == nil && r.SlewNs != 0 {
		err = clock.Slew(time.Duration(r.SlewNs))
	}
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &api.ClockResponse{Time: timestamppb.Now()}, nil
}

func (s *service) Mount(_ context.Context, r *api.MountRequest) (*api.Empty, error) {
	return done(fsmount.Mount(api.GuestRun, r.Mounts))
}

func (s *service) Unmount(_ context.Context, r *api.UnmountRequest) (*api.Empty, error) {
	return done(fsmount.Unmount(api.GuestRun, r.Targets))
}

func (s *service) WriteBundle(_ context.Context, r *api.WriteBundleRequest) (*api.Empty, error) {
	return done(writeBundle(api.GuestBundles, r.Id, r.Config))
}

func (s *service) RemoveBundle(_ context.Context, r *api.RemoveBundleRequest) (*api.Empty, error) {
	return done(removeBundle(api.GuestBundles, r.Id))
}

func (s *service) Devices(context.Context, *api.Empty) (*api.DevicesResponse, error) {
	list, err := device.List("/dev")
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &api.DevicesResponse{Devices: list}, nil
}

func (s *service) OnlineCPUs(_ context.Context, r *api.OnlineCPUsRequest) (*api.Empty, error) {
	s.cpuMu.Lock()
	defer s.cpuMu.Unlock()
	err := cpu.SetOnline(cpu.Root, int(min(r.Count, 1<<16)))
	if err == nil {
		err = s.network.UseQueues()
	}
	return done(err)
}

func (s *service) ConfigureNetwork(_ context.Context, r *api.NetworkConfig) (*api.Empty, error) {
	return done(s.network.Configure(r))
}

func (s *service) OpenPod(_ context.Context, r *api.OpenPodRequest) (*api.Empty, error) {
	return done(s.pod.Open(r))
}

func (s *service) ClosePod(context.Context, *api.Empty) (*api.Empty, error) {
	return done(s.pod.Close())
}

func (s *service) Events(ctx context.Context, _ *api.Empty, stream api.Agent_EventsServer) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("events: panic: %v", v)
		}
	}()
	err = s.events.Stream(ctx, stream.Send)
	if errors.Is(err, context.Canceled) {
		return nil // the connection has gone; nobody hears of it
	}
	return errgrpc.ToGRPC(err)
}

// Shutdown answers before the machine goes, if that is quick enough.
func (s *service) Shutdown(context.Context, *api.Empty) (*api.Empty, error) {
	unix.Sync()
	go s.powerOff()
	return &api.Empty{}, nil
}
