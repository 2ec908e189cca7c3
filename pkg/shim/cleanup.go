package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	containerdshim "github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/pkg/cgroup"
	"github.com/vmrt/vmrt/pkg/hooks"
	"github.com/vmrt/vmrt/pkg/network"
	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/state"
)

// cleanupTimeout bounds `shim delete`; containerd gives up after 5 s.
const cleanupTimeout = 4 * time.Second

// Stop implements `shim delete`: containerd runs it for each bundle of a shim
// that has died. What the shim had in its own namespaces went with it; left are
// processes that are just dying, the cgroup, the state folder, and poststop
// hooks that nobody has run. Idempotent, and several may run at once.
func (manager) Stop(ctx context.Context, id string) (containerdshim.StopStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	bundle, err := bundlePath(ctx, id)
	if err != nil {
		return containerdshim.StopStatus{}, err
	}
	status := containerdshim.StopStatus{ExitStatus: statusKilled, ExitedAt: time.Now()}
	store, st, err := state.FromBundle(bundle)
	if errdefs.IsNotFound(err) && st == nil {
		// It died before there was anything.
		return status, nil
	}
	if errdefs.IsNotFound(err) {
		// It died before it had written its state, or all is gone already.
		return status, store.Remove(st.Namespace, st.ID)
	}
	if errdefs.IsDataLoss(err) {
		// Nothing more can be learned from it.
		return status, errors.Join(err, store.Remove(st.Namespace, st.ID))
	}
	if err != nil {
		return status, err
	}
	if st.Shim.Alive() {
		// Another container of the sandbox, or a request that timed out: the
		// shim still looks after all that it has.
		log.G(ctx).WithField("sandbox", st.ID).Warn("shim is alive, nothing cleaned up")
		return status, nil
	}
	if c, ok := st.Containers[id]; ok {
		status.Pid = c.Pid
		if !c.ExitedAt.IsZero() {
			status.ExitStatus, status.ExitedAt = int(c.ExitStatus), c.ExitedAt
		}
	}
	return status, cleanup(ctx, store, st, id)
}

func bundlePath(ctx context.Context, id string) (string, error) {
	if o, ok := ctx.Value(containerdshim.OptsKey{}).(containerdshim.Opts); ok && o.BundlePath != "" {
		return o.BundlePath, nil
	}
	cwd, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find bundle of container %s: %w", id, err)
	}
	return filepath.Join(filepath.Dir(cwd), id), nil
}

// cleanup ends what is left of the sandbox and takes the container out of its
// state; with the last container the state goes.
func cleanup(ctx context.Context, store state.Store, st *state.Sandbox, id string) error {
	unlock, err := lockSandbox(store, st)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unlock()
	// Until then its socket is one that somebody listens on.
	if err := st.Shim.Wait(ctx); err != nil {
		return fmt.Errorf("clean up sandbox %s: shim: %w", st.ID, err)
	}
	// What another delete has done in the meantime counts.
	st, err = store.Load(st.Namespace, st.ID)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	errs := []error{st.VM.Kill()}
	for _, p := range st.Helpers {
		errs = append(errs, p.Kill())
	}
	errs = append(errs, removeCgroup(ctx, st.CgroupPath), cleanNetwork(ctx, st.NetNS))
	if c, ok := st.Containers[id]; ok {
		err := hooks.RunAll(ctx, hookPoststop, c.Poststop, &specs.State{
			Version: c.OCIVersion, ID: id, Status: specs.StateStopped, Bundle: c.Bundle, Annotations: c.Annotations,
		})
		if err != nil {
			log.G(ctx).WithError(err).WithField("container", id).Warn("hooks")
		}
		delete(st.Containers, id)
	}
	failed := errors.Join(errs...)
	if failed != nil || len(st.Containers) > 0 {
		// Hooks that have run do not run again, when containerd tries once more
		// for what is left.
		if err := errors.Join(failed, store.Save(st)); err != nil {
			return fmt.Errorf("clean up sandbox %s: %w", st.ID, err)
		}
		return nil
	}
	if err := removeSocket(st.Socket); err != nil {
		return fmt.Errorf("clean up sandbox %s: %w", st.ID, err)
	}
	return store.Remove(st.Namespace, st.ID)
}

// removeSocket removes the socket of a dead shim. One that is served is that of
// a new shim for the same sandbox.
func removeSocket(path string) error {
	if path == "" || containerdshim.CanConnect("unix://"+path) {
		return nil
	}
	return containerdshim.RemoveSocket("unix://" + path)
}

func removeCgroup(ctx context.Context, path string) error {
	if path == "" {
		return nil
	}
	cg, err := cgroup.Load(path)
	if err != nil {
		return err
	}
	if err := cg.Kill(ctx); err != nil {
		return err
	}
	return cg.Remove(ctx)
}

// cleanNetwork removes what is left in a network namespace that outlives the
// pod.
func cleanNetwork(ctx context.Context, netns string) error {
	if netns == "" {
		return nil
	}
	ns, err := podns.Open(podns.Config{NetNS: netns})
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer ns.Close()
	// Nothing in the host's is a pod's, and another pod's is its own business.
	if err := ns.ClaimNet(); errors.Is(err, podns.ErrHostNet) || errors.Is(err, podns.ErrNetInUse) {
		return nil
	} else if err != nil {
		return err
	}
	return network.Clean(ctx, ns)
}

// lockSandbox makes deletes of containers of one sandbox take turns.
func lockSandbox(store state.Store, st *state.Sandbox) (unlock func(), err error) {
	dir, err := store.Dir(st.Namespace, st.ID)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock state of sandbox %s: %w", st.ID, err)
	}
	return func() { f.Close() }, nil
}
