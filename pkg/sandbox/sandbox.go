// Package sandbox is the host side of one pod: a virtual machine, the agent in
// it, and what both need on the host (namespaces, cgroup, shared folder). It
// knows containers only as folders in the share and ids in requests; what runs
// in them is pkg/shim's.
//
// New prepares the host, Boot starts the virtual machine, Stop ends and removes
// everything from whatever state it is in. The three are called once each, in
// that order; the rest may be called from any goroutine between Boot and Stop.
//
// The guest is not trusted: every wait for it has a deadline, and its death or
// silence ends this sandbox only. Dead reports the end of the virtual machine
// whatever its cause.
package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/cgroup"
	"github.com/vmrt/vmrt/pkg/config"
	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/idmap"
	"github.com/vmrt/vmrt/pkg/network"
	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/portforward"
	"github.com/vmrt/vmrt/pkg/state"
	"github.com/vmrt/vmrt/pkg/storage"
	"github.com/vmrt/vmrt/pkg/vsock"
)

// Config is what a sandbox is made from. It is not changed afterwards.
type Config struct {
	// ID and Namespace are containerd's.
	ID, Namespace string
	// Bundle is that of the first container, or the sandbox's own. Containers
	// is what Save is to write as soon as there is something to clean up.
	Bundle     string
	Containers map[string]state.Container
	// Settings come from the configuration file.
	Settings *config.Config
	// Socket is the path of the shim's socket, for the state file.
	Socket string
	// NetNS is the path of the pod's network namespace; empty for a new one.
	NetNS string
	// HostNetwork gives the pod the host's network instead. So does a NetNS
	// that is the host's.
	HostNetwork bool
	// CgroupsPath is the OCI spec's, for the pod's cgroup on the host.
	CgroupsPath string
	// MemoryMiB and CPUs size the virtual machine.
	MemoryMiB, CPUs int
	// SpareNICs is how many network interfaces may arrive in the network
	// namespace after the boot (UpdateNetwork).
	SpareNICs int
	// Pod is what several containers share; nil for a container by itself.
	Pod *api.OpenPodRequest
	// IDs are those of the user namespace that the containers may have, which
	// Check accepts; zero for none.
	IDs idmap.Mapping
}

// Sandbox is one pod's host side.
type Sandbox struct {
	cfg     Config
	store   state.Store
	dir     string
	created time.Time

	ns     *podns.Namespaces
	cgroup *cgroup.Cgroup
	// cgroupPath is set before there is a cgroup.
	cgroupPath string
	share      *storage.Share
	host       *hostNetwork // nil for a pod with a network of its own
	names      nameServers

	// Set by Boot, read only once it returned.
	transport vsock.Transport
	daemon    *storage.Daemon
	network   *network.Network       // nil with the host's network
	forwarder *portforward.Forwarder // nil outside pods
	rpc       *ttrpc.Client
	hello     vsock.Conn

	// agentGone is closed when the RPC connection has ended, with agentFault
	// set if that was for what the agent had sent.
	agentGone  chan struct{}
	agentFault error
	// dead is closed when the virtual machine has ended.
	dead     chan struct{}
	deadOnce sync.Once

	// saving is held while the state file is written or removed, and taken
	// before mu.
	saving sync.Mutex

	// mu guards what is read while Boot may run.
	mu sync.Mutex
	// deadErr says why, set before dead is closed.
	deadErr error
	stopped bool
	vm      hypervisor.VM // nil until the VMM was started
	boot    BootInfo
}

// BootInfo says what was booted, for the log and the state file.
type BootInfo struct {
	Kernel      string // "tuned" or "stock"
	Release     string // the guest's uname -r
	Accelerator hypervisor.Accelerator
	// AcceleratorReason says why that one.
	AcceleratorReason string
	Transport         string
	CID               uint32
	VMPid             int
	// How long the phases of the boot took: from its begin to the VMM's
	// start, from there to the agent's Hello, and from there to its end.
	Prepared, Booted, Connected time.Duration
}

// New makes the sandbox's folder, namespaces, cgroup and share. On an error
// nothing is left of it.
func New(cfg Config) (_ *Sandbox, err error) {
	s := &Sandbox{
		cfg: cfg, store: state.Open(cfg.Settings.StateDir), created: time.Now(),
		agentGone: make(chan struct{}), dead: make(chan struct{}),
	}
	if s.cgroupPath, err = cgroup.Path(cfg.CgroupsPath, cfg.ID); err != nil {
		return nil, fmt.Errorf("create cgroup: %w", err)
	}
	// Before anything else: `shim delete` finds what follows, whenever this
	// process is killed.
	if err := s.Link(cfg.Bundle); err != nil {
		return nil, fmt.Errorf("create sandbox %s: %w", cfg.ID, err)
	}
	if s.dir, err = s.store.Create(cfg.Namespace, cfg.ID); err != nil {
		return nil, fmt.Errorf("create sandbox %s: %w", cfg.ID, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("create sandbox %s: %w", cfg.ID, err), s.Stop(context.Background()))
		}
	}()
	if err := s.Save(cfg.Containers); err != nil {
		return nil, err
	}
	if s.cgroup, err = cgroup.Create(cfg.CgroupsPath, cfg.ID); err != nil {
		return nil, fmt.Errorf("create cgroup: %w", err)
	}
	netns := cfg.NetNS
	if cfg.HostNetwork {
		netns = hostNetNS
	}
	if s.ns, err = podns.Open(podns.Config{NetNS: netns, Start: s.cgroup.Start}); err != nil {
		return nil, fmt.Errorf("open namespaces: %w", err)
	}
	err = s.ns.ClaimNet()
	if errors.Is(err, podns.ErrHostNet) {
		s.host, err = newHostNetwork(cfg.Settings)
	}
	if err != nil {
		return nil, fmt.Errorf("join network namespace %s: %w: %w", netns, err, errdefs.ErrFailedPrecondition)
	}
	if err := os.Mkdir(s.EmptyDir(), 0o755); err != nil {
		return nil, err
	}
	share := filepath.Join(s.dir, "share")
	if err := os.Mkdir(share, 0o700); err != nil {
		return nil, err
	}
	if s.share, err = storage.NewShare(s.ns, share); err != nil {
		return nil, fmt.Errorf("create shared folder: %w", err)
	}
	return s, nil
}

// Namespaces are the pod's on the host; they end with Stop.
func (s *Sandbox) Namespaces() *podns.Namespaces { return s.ns }

// Cgroup is the pod's on the host.
func (s *Sandbox) Cgroup() *cgroup.Cgroup { return s.cgroup }

// Share is the folder that the guest sees at api.GuestShare.
func (s *Sandbox) Share() *storage.Share { return s.share }

// ID is containerd's id of the container or sandbox that it was made for.
func (s *Sandbox) ID() string { return s.cfg.ID }

// EmptyDir is a folder on the host that stays empty.
func (s *Sandbox) EmptyDir() string { return filepath.Join(s.dir, "empty") }

// FilesDir is the folder for the pod's files. It does not exist at first.
func (s *Sandbox) FilesDir() string { return filepath.Join(s.dir, "files") }

// Settings returns the configuration that the sandbox was made with.
func (s *Sandbox) Settings() *config.Config { return s.cfg.Settings }

// Info describes what Boot has booted so far. It may be called at any time.
func (s *Sandbox) Info() BootInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.boot
}

// learn adds to Info.
func (s *Sandbox) learn(set func(*BootInfo)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	set(&s.boot)
}

// machine returns the virtual machine, or nil before it was started.
func (s *Sandbox) machine() hypervisor.VM {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.vm
}

// Agent speaks vmrt.agent.v1 to the guest.
func (s *Sandbox) Agent() api.AgentClient { return api.NewAgentClient(s.rpc) }

// Tasks speaks containerd.task.v3 to the guest.
func (s *Sandbox) Tasks() taskapi.TTRPCTaskService { return taskapi.NewTTRPCTaskClient(s.rpc) }

// Dead is closed when the virtual machine has ended or can no longer be used.
func (s *Sandbox) Dead() <-chan struct{} { return s.dead }

// Err says why the virtual machine ended; nil before Dead and after Stop.
func (s *Sandbox) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.deadErr
}

// die closes Dead with a reason; the first reason stays.
func (s *Sandbox) die(why error) {
	s.deadOnce.Do(func() {
		s.mu.Lock()
		if !s.stopped {
			s.deadErr = why
		}
		s.mu.Unlock()
		close(s.dead)
	})
}

// Kill ends the virtual machine at once, for a guest that no longer answers.
// why becomes Err.
func (s *Sandbox) Kill(ctx context.Context, why error) error {
	s.die(why)
	if vm := s.machine(); vm != nil {
		return vm.Kill(ctx)
	}
	return nil
}

// Stop ends the virtual machine and removes all that New and Boot made, except
// what must outlive the sandbox (nothing). Idempotent. An error names what is
// left; a later call tries that again.
func (s *Sandbox) Stop(ctx context.Context) error {
	s.mu.Lock()
	s.stopped = true
	s.mu.Unlock()
	s.die(nil)

	var errs []error
	if vm := s.machine(); vm != nil {
		errs = append(errs, vm.Kill(ctx))
	}
	if s.rpc != nil {
		s.rpc.Close()
	}
	if s.hello != nil {
		s.hello.Close()
	}
	errs = append(errs, s.closeNetwork(ctx))
	if s.transport != nil {
		errs = append(errs, s.transport.Close())
	}
	if s.daemon != nil {
		errs = append(errs, s.daemon.Close())
	}
	if s.share != nil {
		errs = append(errs, s.share.Close())
	}
	if s.ns != nil {
		errs = append(errs, s.ns.Close())
	}
	if s.cgroup != nil {
		errs = append(errs, s.cgroup.Kill(ctx), s.cgroup.Remove(ctx))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("stop sandbox %s: %w", s.cfg.ID, err)
	}
	s.saving.Lock()
	defer s.saving.Unlock()
	if err := s.store.Remove(s.cfg.Namespace, s.cfg.ID); err != nil {
		return fmt.Errorf("stop sandbox %s: %w", s.cfg.ID, err)
	}
	return nil
}

func (s *Sandbox) isStopped() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopped
}

// Save writes the state file, from which `shim delete` cleans up when this
// process was killed. Call it when containers change, and after Boot. From Stop
// on it does nothing: the file is about to go.
func (s *Sandbox) Save(containers map[string]state.Container) error {
	s.saving.Lock()
	defer s.saving.Unlock()
	if s.isStopped() {
		return nil
	}
	netns := s.cfg.NetNS
	if s.host != nil {
		netns = "" // nothing of it is the pod's to clean up
	}
	boot := s.Info()
	st := &state.Sandbox{
		ID: s.cfg.ID, Namespace: s.cfg.Namespace, Created: s.created, Containers: containers,
		Socket: s.cfg.Socket, CgroupPath: s.cgroupPath, NetNS: netns, Kernel: boot.Kernel, Accelerator: string(boot.Accelerator),
		Vsock: boot.Transport, CID: boot.CID,
	}
	var err error
	if st.Shim, err = state.Find(os.Getpid()); err != nil {
		return fmt.Errorf("save state of sandbox %s: %w", s.cfg.ID, err)
	}
	if vm := s.machine(); vm != nil {
		// Gone already is no reason not to save the rest.
		st.VM, _ = state.Find(vm.Pid())
	}
	return s.store.Save(st)
}

// Link makes a container's bundle lead to this sandbox's state.
func (s *Sandbox) Link(bundle string) error {
	return s.store.Link(bundle, s.cfg.Namespace, s.cfg.ID)
}
