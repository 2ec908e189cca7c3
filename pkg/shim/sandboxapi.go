package shim

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime"
	"sync"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/anchor"
	"github.com/vmrt/vmrt/pkg/cgroup"
	"github.com/vmrt/vmrt/pkg/sandbox"
)

// The states that SandboxStatus knows: those of CRI.
const (
	sandboxReady    = "SANDBOX_READY"
	sandboxNotReady = "SANDBOX_NOTREADY"
)

// apiSandbox is a sandbox that containerd made by the Sandbox API, in which a
// pod is no container.
type apiSandbox struct {
	id      string
	created time.Time
	anchor  *anchor.Anchor
	// exited is closed when the sandbox has ended, with status and exitedAt
	// set.
	exited chan struct{}

	mu       sync.Mutex
	started  bool
	stopping bool
	shutDown bool
	status   uint32
	exitedAt time.Time
}

func (a *apiSandbox) pid() uint32 { return uint32(a.anchor.Pid()) }

func (a *apiSandbox) isShutDown() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.shutDown
}

// end records the end. Only the first call counts.
func (a *apiSandbox) end(at time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.exitedAt.IsZero() {
		return
	}
	if !a.stopping {
		a.status = statusKilled
	}
	a.exitedAt = at
	close(a.exited)
}

func (a *apiSandbox) snapshot() (started bool, status uint32, exitedAt time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.started, a.status, a.exitedAt
}

// findSandbox returns the sandbox that CreateSandbox made.
func (s *service) findSandbox(id string) (*apiSandbox, *sandbox.Sandbox, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.api == nil || s.api.id != id {
		return nil, nil, fmt.Errorf("sandbox %s: %w", id, errdefs.ErrNotFound)
	}
	return s.api, s.sandbox, nil
}

// sandboxEnded notes the end of the virtual machine.
func (s *service) sandboxEnded(at time.Time) {
	s.mu.Lock()
	a := s.api
	s.mu.Unlock()
	if a != nil {
		a.end(at)
	}
}

// CreateSandbox prepares the pod on the host and begins to boot its virtual
// machine.
func (s *service) CreateSandbox(ctx context.Context, r *sandboxapi.CreateSandboxRequest) (*sandboxapi.CreateSandboxResponse, error) {
	if err := s.createSandbox(ctx, r); err != nil {
		return nil, toGRPC(refuse(fmt.Errorf("create sandbox %s: %w", r.SandboxID, err)))
	}
	return &sandboxapi.CreateSandboxResponse{}, nil
}

func (s *service) createSandbox(ctx context.Context, r *sandboxapi.CreateSandboxRequest) (err error) {
	if err := api.CheckID(r.SandboxID); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	pod, err := podOfCRI(r.SandboxID, r.NetnsPath, r.Options)
	if err != nil {
		return err
	}
	s.mu.Lock()
	if s.sandbox != nil || s.api != nil {
		s.mu.Unlock()
		return errdefs.ErrAlreadyExists
	}
	err = s.newSandbox(r.SandboxID, r.BundlePath, pod, nil, nil)
	sb := s.sandbox
	s.mu.Unlock()
	if err != nil {
		return err
	}
	s.startBoot()
	var undo rollback
	defer func() {
		if err != nil {
			undo.run(ctx)
		}
	}()
	undo.add(func(ctx context.Context) {
		if err := s.dropSandbox(ctx, sb); err != nil {
			log.G(ctx).WithError(err).Error("stop sandbox of a failed create")
		}
	})
	if err := pod.writeFiles(sb.FilesDir()); err != nil {
		return fmt.Errorf("write the pod's files: %w", err)
	}
	a := &apiSandbox{id: r.SandboxID, created: time.Now(), exited: make(chan struct{})}
	if a.anchor, err = anchor.Start(sb.Namespaces(), anchor.Config{Args: []string{"pause"}, Root: sb.EmptyDir()}); err != nil {
		return fmt.Errorf("start anchor: %w", err)
	}
	undo.add(func(context.Context) { a.anchor.Close() })
	s.mu.Lock()
	s.api = a
	s.mu.Unlock()
	s.saveState()
	return nil
}

// StartSandbox returns once the virtual machine is ready.
func (s *service) StartSandbox(ctx context.Context, r *sandboxapi.StartSandboxRequest) (*sandboxapi.StartSandboxResponse, error) {
	defer s.memory.soon()
	a, _, err := s.findSandbox(r.SandboxID)
	if err != nil {
		return nil, toGRPC(err)
	}
	a.mu.Lock()
	again := a.started
	a.started = true
	a.mu.Unlock()
	if again {
		return nil, toGRPC(fmt.Errorf("start sandbox %s: it was started before: %w", a.id, errdefs.ErrFailedPrecondition))
	}
	if err := s.waitBoot(ctx); err != nil {
		s.sandboxEnded(time.Now())
		return nil, toGRPC(fmt.Errorf("start sandbox %s: %w", a.id, err))
	}
	s.saveState()
	return &sandboxapi.StartSandboxResponse{Pid: a.pid(), CreatedAt: timestamppb.New(a.created)}, nil
}

// Platform says what the guest runs.
func (s *service) Platform(ctx context.Context, r *sandboxapi.PlatformRequest) (*sandboxapi.PlatformResponse, error) {
	if _, _, err := s.findSandbox(r.SandboxID); err != nil {
		return nil, toGRPC(err)
	}
	return &sandboxapi.PlatformResponse{Platform: &types.Platform{OS: "linux", Architecture: runtime.GOARCH}}, nil
}

// StopSandbox ends the virtual machine and with it every container, and gives
// back the pod's network namespace. Idempotent.
func (s *service) StopSandbox(ctx context.Context, r *sandboxapi.StopSandboxRequest) (*sandboxapi.StopSandboxResponse, error) {
	a, _, err := s.findSandbox(r.SandboxID)
	if err != nil {
		return nil, toGRPC(err)
	}
	if err := s.stopAPISandbox(ctx, a); err != nil {
		return nil, toGRPC(err)
	}
	return &sandboxapi.StopSandboxResponse{}, nil
}

func (s *service) stopAPISandbox(ctx context.Context, a *apiSandbox) error {
	a.mu.Lock()
	a.stopping = true
	a.mu.Unlock()
	a.anchor.Close()
	if err := s.stopSandbox(ctx); err != nil {
		return err
	}
	// Of a virtual machine that was up, follow announces the containers' ends
	// first.
	s.mu.Lock()
	following := s.bootErr == nil
	s.mu.Unlock()
	if !following {
		a.end(time.Now())
	}
	select {
	case <-a.exited:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// WaitSandbox returns when the sandbox has ended: with status 0 when it was
// stopped, and 137 when its virtual machine has ended by itself.
func (s *service) WaitSandbox(ctx context.Context, r *sandboxapi.WaitSandboxRequest) (*sandboxapi.WaitSandboxResponse, error) {
	a, _, err := s.findSandbox(r.SandboxID)
	if err != nil {
		return nil, toGRPC(err)
	}
	select {
	case <-a.exited:
	case <-ctx.Done():
		return nil, toGRPC(ctx.Err())
	}
	_, status, exitedAt := a.snapshot()
	return &sandboxapi.WaitSandboxResponse{ExitStatus: status, ExitedAt: timestamppb.New(exitedAt)}, nil
}

// SandboxStatus says how the sandbox is, from the host's record alone.
func (s *service) SandboxStatus(ctx context.Context, r *sandboxapi.SandboxStatusRequest) (*sandboxapi.SandboxStatusResponse, error) {
	a, sb, err := s.findSandbox(r.SandboxID)
	if err != nil {
		return nil, toGRPC(err)
	}
	started, _, exitedAt := a.snapshot()
	resp := &sandboxapi.SandboxStatusResponse{
		SandboxID: a.id, Pid: a.pid(), State: sandboxNotReady, CreatedAt: timestamppb.New(a.created),
	}
	switch {
	case !exitedAt.IsZero():
		resp.ExitedAt = timestamppb.New(exitedAt)
	case started:
		resp.State = sandboxReady
	}
	if r.Verbose {
		if resp.Info, err = s.sandboxInfo(a, sb, resp.State); err != nil {
			return nil, toGRPC(err)
		}
	}
	return resp, nil
}

// sandboxInfo is what `crictl inspectp` shows: under "info" what CRI knows, and
// under "vmrt" the virtual machine.
func (s *service) sandboxInfo(a *apiSandbox, sb *sandbox.Sandbox, status string) (map[string]string, error) {
	process := "running"
	if status != sandboxReady {
		process = "stopped"
	}
	info, err := json.Marshal(map[string]any{
		"pid": a.pid(), "processStatus": process, "runtimeType": RuntimeName,
	})
	if err != nil {
		return nil, err
	}
	out := map[string]string{"info": string(info)}
	if s.hasBooted() {
		machine, err := json.Marshal(sb.Info())
		if err != nil {
			return nil, err
		}
		out["vmrt"] = string(machine)
	}
	return out, nil
}

// hasBooted reports whether the virtual machine was ready, at some time.
func (s *service) hasBooted() bool {
	s.mu.Lock()
	booted := s.booted
	s.mu.Unlock()
	select {
	case <-booted:
	default:
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bootErr == nil
}

// PingSandbox returns an error unless the virtual machine lives.
func (s *service) PingSandbox(ctx context.Context, r *sandboxapi.PingRequest) (*sandboxapi.PingResponse, error) {
	_, sb, err := s.findSandbox(r.SandboxID)
	if err == nil {
		err = alive(sb)
	}
	if err != nil {
		return nil, toGRPC(err)
	}
	return &sandboxapi.PingResponse{}, nil
}

// ShutdownSandbox ends the sandbox, if it has not ended yet, and the shim.
func (s *service) ShutdownSandbox(ctx context.Context, r *sandboxapi.ShutdownSandboxRequest) (*sandboxapi.ShutdownSandboxResponse, error) {
	a, _, err := s.findSandbox(r.SandboxID)
	switch {
	case err == nil:
		if err := s.stopAPISandbox(ctx, a); err != nil {
			log.G(ctx).WithError(err).Error("stop sandbox")
		}
		a.mu.Lock()
		a.shutDown = true
		a.mu.Unlock()
	case s.isIdle():
		// Its creation has failed: the shim is of no use any more.
	default:
		return nil, toGRPC(err)
	}
	// ttrpc does not tell when an answer was written, and containerd takes its
	// loss for a failure.
	time.AfterFunc(answerGrace, s.shutdown.Shutdown)
	return &sandboxapi.ShutdownSandboxResponse{}, nil
}

// answerGrace is the time that the last answers have to leave the process.
const answerGrace = 50 * time.Millisecond

// isIdle reports whether the shim has nothing to look after.
func (s *service) isIdle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sandbox == nil && s.api == nil && len(s.containers) == 0
}

// SandboxMetrics are what the host counts for the pod.
func (s *service) SandboxMetrics(ctx context.Context, r *sandboxapi.SandboxMetricsRequest) (*sandboxapi.SandboxMetricsResponse, error) {
	_, sb, err := s.findSandbox(r.SandboxID)
	if err == nil {
		err = alive(sb)
	}
	if err != nil {
		return nil, toGRPC(err)
	}
	data, err := podMetrics(sb)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &sandboxapi.SandboxMetricsResponse{Metrics: &types.Metric{
		Timestamp: timestamppb.Now(), ID: r.SandboxID, Data: data,
	}}, nil
}

// updatedResources is the extension by which CRI says a pod's new size
// (containerd, internal/cri/server/podsandbox, UpdatedResources).
const updatedResources = "updated-resources"

// updatedSize is the part of the extension that counts here.
type updatedSize struct {
	CPUPeriod int64 `json:"cpu_period"`
	CPUQuota  int64 `json:"cpu_quota"`
	Memory    int64 `json:"memory_limit_in_bytes"`
}

// limits returns the size of a pod with an overhead, which may be nil, as limits
// of its containers. The kubelet (1.34 to 1.36) reads from the pod's cgroup what
// has no limit, and takes the overhead off all the same: from -1, or from what
// cgroup v1 shows for no memory limit.
func (u *updatedSize) limits(overhead *updatedSize) limits {
	l := limits{memory: u.Memory, cpuQuota: u.CPUQuota, period: u.CPUPeriod}
	if overhead == nil {
		overhead = &updatedSize{}
	}
	if l.memory >= cgroup.NoLimit || l.memory == -1-overhead.Memory {
		l.memory = -1
	}
	if l.cpuQuota == -1-overhead.CPUQuota {
		l.cpuQuota = -1
	}
	return l
}

// UpdateSandbox takes a pod's new size. More CPUs come online as far as the
// machine has them; memory is the guest's from the start.
func (s *service) UpdateSandbox(ctx context.Context, r *sandboxapi.UpdateSandboxRequest) (*sandboxapi.UpdateSandboxResponse, error) {
	_, sb, err := s.findSandbox(r.SandboxID)
	if err == nil {
		err = alive(sb)
	}
	if err != nil {
		return nil, toGRPC(err)
	}
	ext, ok := r.GetSandbox().GetExtensions()[updatedResources]
	if !ok {
		return &sandboxapi.UpdateSandboxResponse{}, nil
	}
	var wanted struct{ Overhead, Resources *updatedSize }
	if err := json.Unmarshal(ext.GetValue(), &wanted); err != nil {
		return nil, toGRPC(fmt.Errorf("update sandbox %s: decode %s: %w: %w", r.SandboxID, updatedResources, err, errdefs.ErrInvalidArgument))
	}
	if wanted.Resources == nil {
		return &sandboxapi.UpdateSandboxResponse{}, nil
	}
	if err := s.resize(ctx, sb, wanted.Resources.limits(wanted.Overhead)); err != nil {
		return nil, toGRPC(fmt.Errorf("update sandbox %s: %w", r.SandboxID, err))
	}
	return &sandboxapi.UpdateSandboxResponse{}, nil
}

// resize brings as many CPUs online as the limits can use.
func (s *service) resize(ctx context.Context, sb *sandbox.Sandbox, l limits) error {
	host, err := thisMachine()
	if err != nil {
		return err
	}
	s.mu.Lock()
	if s.pod != nil { // else it ends now
		l.shareMiB = s.pod.limits.shareMiB
	}
	s.mu.Unlock()
	memory, cpus, err := host.size(l, sb.Settings())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, guestTimeout)
	defer cancel()
	return sb.Resize(ctx, memory, cpus)
}
