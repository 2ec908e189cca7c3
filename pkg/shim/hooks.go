package shim

import (
	"context"
	"slices"

	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/pkg/hooks"
	"github.com/vmrt/vmrt/pkg/state"
)

// The hook lists that run on the host, by their names in the OCI spec. The
// others run in the guest or are refused (package guestspec).
const (
	hookPrestart      = "prestart"
	hookCreateRuntime = "createRuntime"
	hookPoststart     = "poststart"
	hookPoststop      = "poststop"
)

func hookList(h *specs.Hooks, name string) []specs.Hook {
	if h == nil {
		return nil
	}
	switch name {
	case hookPrestart:
		//lint:ignore SA1019 deprecated, and still in use
		return h.Prestart
	case hookCreateRuntime:
		return h.CreateRuntime
	case hookPoststart:
		return h.Poststart
	case hookPoststop:
		return h.Poststop
	}
	return nil
}

// hasHooks reports whether one of the lists named is not empty.
func hasHooks(h *specs.Hooks, names ...string) bool {
	return slices.ContainsFunc(names, func(name string) bool { return len(hookList(h, name)) > 0 })
}

func (c *container) hookState(status specs.ContainerState) *specs.State {
	st := &specs.State{
		Version: c.spec.Version, ID: c.id, Status: status, Bundle: c.bundle, Annotations: c.spec.Annotations,
	}
	if status != specs.StateStopped {
		st.Pid = int(c.pid())
	}
	return st
}

// runHooks runs lists whose failure is the operation's.
func (s *service) runHooks(ctx context.Context, c *container, status specs.ContainerState, names ...string) error {
	for _, name := range names {
		if err := hooks.Run(ctx, name, hookList(c.spec.Hooks, name), c.hookState(status)); err != nil {
			return err
		}
	}
	return nil
}

// runPoststop runs the poststop hooks, whose failures are only logged.
func (s *service) runPoststop(ctx context.Context, c *container) {
	err := hooks.RunAll(ctx, hookPoststop, hookList(c.spec.Hooks, hookPoststop), c.hookState(specs.StateStopped))
	if err != nil {
		log.G(ctx).WithError(err).WithField("container", c.id).Warn("hooks")
	}
}

// record is the container as the state file has it.
func (c *container) record() state.Container {
	_, status, exitedAt := c.init.snapshot()
	return state.Container{
		Bundle: c.bundle, OCIVersion: c.spec.Version, Annotations: c.spec.Annotations,
		Poststop: hookList(c.spec.Hooks, hookPoststop), Pid: int(c.pid()),
		ExitStatus: status, ExitedAt: exitedAt,
	}
}

// saveState writes what `shim delete` needs if this process is killed.
func (s *service) saveState() {
	// The newest record is written last.
	s.saving.Lock()
	defer s.saving.Unlock()
	s.mu.Lock()
	sb := s.sandbox
	containers := make(map[string]state.Container, len(s.containers))
	for id, c := range s.containers {
		containers[id] = c.record()
	}
	s.mu.Unlock()
	if sb == nil {
		return
	}
	if err := sb.Save(containers); err != nil {
		log.G(s.ctx).WithError(err).Error("save sandbox state")
	}
}
