package shim

import (
	"context"
	"errors"
	"fmt"
	"time"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmrt/vmrt/pkg/config"
	"github.com/vmrt/vmrt/pkg/sandbox"
	"github.com/vmrt/vmrt/pkg/state"
)

// deathNotice is how long after a broken connection the end of the virtual
// machine may take to be noticed.
const deathNotice = 2 * time.Second

func brokenConnection(err error) bool {
	return errors.Is(err, ttrpc.ErrClosed) || errdefs.IsUnavailable(err)
}

// ensureSandbox returns the sandbox, making it for the first container.
func (s *service) ensureSandbox(c *container, options *anypb.Any) (_ *sandbox.Sandbox, first bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sandbox != nil {
		if s.podEnded() {
			return nil, false, fmt.Errorf("create container %s: pod %s has ended: %w", c.id, s.sandbox.ID(), errdefs.ErrUnavailable)
		}
		return s.sandbox, false, alive(s.sandbox)
	}
	if s.api != nil {
		return nil, false, fmt.Errorf("create container %s: sandbox %s has ended: %w", c.id, s.api.id, errdefs.ErrUnavailable)
	}
	pod, err := podOfSpec(c.spec)
	if err != nil {
		return nil, false, fmt.Errorf("container %s: %w", c.id, err)
	}
	if err := s.newSandbox(c.id, c.bundle, pod, options, map[string]state.Container{c.id: c.record()}); err != nil {
		return nil, false, err
	}
	return s.sandbox, true, nil
}

// podEnded reports whether the container that stands for the pod has ended,
// whose namespaces no other can join any more. s.mu is held.
func (s *service) podEnded() bool {
	if s.api != nil || s.pod == nil || s.pod.open == nil {
		return false // no container stands for a pod
	}
	c := s.containers[s.sandbox.ID()]
	if c == nil {
		return true
	}
	state, _, _ := c.init.snapshot()
	return state == statusStopped
}

// newSandbox makes the sandbox, whose state begins with containers. s.mu is
// held.
func (s *service) newSandbox(id, bundle string, pod *podConfig, options *anypb.Any, containers map[string]state.Container) error {
	settings, err := loadSettings(options)
	if err != nil {
		return err
	}
	host, err := thisMachine()
	if err != nil {
		return err
	}
	pod.learnOverhead(settings)
	memory, cpus, err := host.size(pod.limits, settings)
	if err != nil {
		return fmt.Errorf("size virtual machine of sandbox %s: %w", id, err)
	}
	sb, err := sandbox.New(sandbox.Config{
		ID: id, Namespace: s.namespace, Bundle: bundle, Containers: containers, Socket: s.socket,
		Settings: settings, NetNS: pod.netns, HostNetwork: pod.hostNetwork, CgroupsPath: pod.cgroupsPath,
		MemoryMiB: memory, CPUs: cpus, Pod: pod.open, IDs: pod.ids, SpareNICs: pod.spareNICs(settings),
	})
	if err != nil {
		return err
	}
	s.pod, s.sandbox, s.booted, s.bootErr = pod, sb, nil, nil
	return nil
}

// startBoot begins to boot the sandbox's virtual machine.
func (s *service) startBoot() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.booted = make(chan struct{})
	go s.boot(s.sandbox, s.booted)
}

// alive returns an error once the virtual machine has ended.
func alive(sb *sandbox.Sandbox) error {
	select {
	case <-sb.Dead():
		return fmt.Errorf("virtual machine has ended: %w", errdefs.ErrUnavailable)
	default:
		return nil
	}
}

func (s *service) boot(sb *sandbox.Sandbox, booted chan struct{}) {
	err := sb.Boot(s.ctx)
	s.mu.Lock()
	s.bootErr = err
	s.mu.Unlock()
	close(booted)
	if err == nil {
		s.follow(sb)
	}
}

// waitBoot returns once the virtual machine can be used.
func (s *service) waitBoot(ctx context.Context) error {
	s.mu.Lock()
	booted := s.booted
	s.mu.Unlock()
	if booted == nil {
		return fmt.Errorf("virtual machine is not being started yet: %w", errdefs.ErrUnavailable)
	}
	select {
	case <-booted:
	case <-ctx.Done():
		return ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bootErr
}

// dropSandbox ends a sandbox whose first container could not be created.
func (s *service) dropSandbox(ctx context.Context, sb *sandbox.Sandbox) error {
	s.mu.Lock()
	booted := s.booted
	if s.sandbox == sb {
		s.sandbox, s.pod = nil, nil
	}
	s.mu.Unlock()
	return endSandbox(ctx, sb, booted)
}

// loadSettings reads the configuration file, which the runtime options of the
// request may name.
func loadSettings(options *anypb.Any) (*config.Config, error) {
	path, err := configPath(options)
	if err != nil {
		return nil, err
	}
	return config.Load(path)
}

// configPath returns the configuration file that runtime options name, if any.
func configPath(options *anypb.Any) (string, error) {
	if len(options.GetValue()) == 0 {
		return "", nil
	}
	v, err := typeurl.UnmarshalAny(options)
	if err != nil {
		return "", fmt.Errorf("decode runtime options %s: %w: %w", options.GetTypeUrl(), err, errdefs.ErrInvalidArgument)
	}
	switch o := v.(type) {
	case *runtimeoptions.Options:
		return o.GetConfigPath(), nil
	case *runcoptions.Options:
		// Clients send these to every runtime; nothing in them is for us.
		return "", nil
	}
	return "", fmt.Errorf("runtime options of type %s: %w", options.GetTypeUrl(), errdefs.ErrInvalidArgument)
}
