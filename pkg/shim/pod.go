package shim

import (
	"context"
	"errors"
	"fmt"
	"time"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmrt/vmrt/pkg/config"
	"github.com/vmrt/vmrt/pkg/sandbox"
)

// deathNotice is how long after a broken connection the end of the virtual
// machine may take to be noticed.
const deathNotice = 2 * time.Second

func brokenConnection(err error) bool {
	return errors.Is(err, ttrpc.ErrClosed) || errdefs.IsUnavailable(err)
}

// ensureSandbox returns the sandbox, making it and starting its boot for the
// first container.
func (s *service) ensureSandbox(c *container, options *anypb.Any) (_ *sandbox.Sandbox, first bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sandbox != nil {
		return s.sandbox, false, nil
	}
	settings, err := loadSettings(options)
	if err != nil {
		return nil, false, err
	}
	cfg := sandbox.Config{ID: c.id, Namespace: s.namespace, Settings: settings}
	if c.spec.Linux != nil {
		cfg.CgroupsPath = c.spec.Linux.CgroupsPath
		for _, ns := range c.spec.Linux.Namespaces {
			if ns.Type == specs.NetworkNamespace {
				cfg.NetNS = ns.Path
			}
		}
	}
	sb, err := sandbox.New(cfg)
	if err != nil {
		return nil, false, err
	}
	s.sandbox, s.booted, s.bootErr = sb, make(chan struct{}), nil
	go s.boot(sb, s.booted)
	return sb, true, nil
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
		s.sandbox = nil
	}
	s.mu.Unlock()
	// Boot must have returned before Stop; a dead machine ends it at once.
	if err := sb.Kill(ctx, nil); err != nil {
		log.G(ctx).WithError(err).Warn("kill virtual machine")
	}
	select {
	case <-booted:
	case <-ctx.Done():
		return ctx.Err()
	}
	return sb.Stop(ctx)
}

// loadSettings reads the configuration file, which the runtime options of the
// request may name.
func loadSettings(options *anypb.Any) (*config.Config, error) {
	path := ""
	if len(options.GetValue()) > 0 {
		v, err := typeurl.UnmarshalAny(options)
		if err != nil {
			return nil, fmt.Errorf("decode runtime options %s: %w: %w", options.GetTypeUrl(), err, errdefs.ErrInvalidArgument)
		}
		switch o := v.(type) {
		case *runtimeoptions.Options:
			path = o.GetConfigPath()
		case *runcoptions.Options:
			// Clients send these to every runtime; nothing in them is for us.
		default:
			return nil, fmt.Errorf("runtime options of type %s: %w", options.GetTypeUrl(), errdefs.ErrInvalidArgument)
		}
	}
	return config.Load(path)
}
