package shim

import (
	"context"
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"strings"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/anchor"
	"github.com/vmrt/vmrt/pkg/guestspec"
	"github.com/vmrt/vmrt/pkg/sandbox"
	"github.com/vmrt/vmrt/pkg/stdio"
	"github.com/vmrt/vmrt/pkg/storage"
)

// rollback undoes what a failed operation had done, last first.
type rollback []func(context.Context)

func (r *rollback) add(undo func(context.Context)) { *r = append(*r, undo) }

// run calls what was added. The operation's context may have ended already.
func (r rollback) run(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	for i := len(r) - 1; i >= 0; i-- {
		r[i](ctx)
	}
}

// Create makes a container, and with the first one the virtual machine.
func (s *service) Create(ctx context.Context, r *taskapi.CreateTaskRequest) (_ *taskapi.CreateTaskResponse, err error) {
	defer s.memory.soon()
	phases := startPhases()
	var undo rollback
	defer func() {
		if err != nil {
			log.G(ctx).WithError(err).WithField("container", r.ID).Debug("create failed")
			undo.run(ctx)
		}
	}()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	c, err := s.newContainer(r, cancel)
	if err != nil {
		return nil, toGRPC(refuse(err))
	}
	undo.add(func(context.Context) { close(c.settled) })
	undo.add(func(context.Context) { s.forget(c) })
	if err := s.create(ctx, c, r, &undo, phases); err != nil {
		return nil, toGRPC(refuse(err))
	}
	close(c.settled)
	phases.log(ctx, "container created", c.id)
	return &taskapi.CreateTaskResponse{Pid: c.pid()}, nil
}

// refuse changes the kind of an error of Create that says "not implemented":
// containerd takes that for a shim of an older Task API, asks again in that,
// and shows the user the second error.
func refuse(err error) error {
	if !errdefs.IsNotImplemented(err) {
		return err
	}
	return errgrpc.ToNative(status.Error(codes.FailedPrecondition, err.Error()))
}

// newContainer checks the request and records the container, whose creation
// cancel ends.
func (s *service) newContainer(r *taskapi.CreateTaskRequest, cancel context.CancelCauseFunc) (*container, error) {
	if err := api.CheckID(r.ID); err != nil {
		return nil, fmt.Errorf("create container: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if r.Checkpoint != "" {
		return nil, fmt.Errorf("restore container %s from a checkpoint: not supported in a virtual machine: %w", r.ID, errdefs.ErrNotImplemented)
	}
	spec, err := guestspec.Load(r.Bundle)
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", r.ID, err)
	}
	if err := guestspec.Check(guestspec.Input{ID: r.ID, Bundle: r.Bundle, Spec: spec}); err != nil {
		return nil, fmt.Errorf("create container %s: %w", r.ID, err)
	}
	known := make(chan struct{})
	c := &container{
		id: r.ID, bundle: r.Bundle, spec: spec, isPod: isPod(spec), execs: map[string]*process{}, known: known, settled: make(chan struct{}), cancel: cancel,
		init: newProcess("", stdio.Config{
			Namespace: s.namespace, ID: r.ID,
			Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal,
			Streaming: s.streaming, StdinAfter: known,
		}),
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.abandoned {
		return nil, fmt.Errorf("create container %s: %w", c.id, errAbandoned)
	}
	if _, ok := s.containers[c.id]; ok {
		return nil, fmt.Errorf("container %s: %w", c.id, errdefs.ErrAlreadyExists)
	}
	s.containers[c.id] = c
	return c, nil
}

func (s *service) forget(c *container) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.containers[c.id] == c {
		delete(s.containers, c.id)
	}
}

// create brings the container to the state "created". What it does on the host
// runs beside the boot of the virtual machine.
func (s *service) create(ctx context.Context, c *container, r *taskapi.CreateTaskRequest, undo *rollback, phases *phases) error {
	sb, first, err := s.ensureSandbox(c, r.Options)
	if err != nil {
		return err
	}
	if first {
		undo.add(func(ctx context.Context) {
			if err := s.dropSandbox(ctx, sb); err != nil {
				log.G(ctx).WithError(err).Error("stop sandbox of a failed create")
			}
		})
	} else if err := sb.Link(c.bundle); err != nil {
		return err
	}
	c.removeFiles = func() error { return sb.Share().RemoveContainer(c.id) }
	undo.add(func(ctx context.Context) {
		if err := c.removeFiles(); err != nil {
			log.G(ctx).WithError(err).Warn("remove container's folders")
		}
	})
	undo.add(func(context.Context) { c.releasePid() })
	// A hook may make the network interfaces that the virtual machine is to
	// have. Without one the boot goes on beside what is done on the host.
	late := hasHooks(c.spec.Hooks, hookPrestart, hookCreateRuntime)
	if first && !late {
		s.startBoot()
	}
	if err := s.prepareHost(ctx, sb, c, r.Rootfs, undo); err != nil {
		return err
	}
	if first && late {
		s.startBoot()
	}
	io, err := stdio.Open(ctx, c.init.stdio)
	if err != nil {
		return err
	}
	c.init.setIO(io)
	undo.add(func(context.Context) { io.Close() })
	phases.end("host")

	if err := s.waitBoot(ctx); err != nil {
		return err
	}
	phases.end("boot")
	if !c.isPod {
		err = s.createInGuest(ctx, sb, c, io, undo)
	}
	phases.end("guest")
	if err != nil {
		return err
	}
	if err := s.appear(c); err != nil {
		return err
	}
	s.created(ctx, sb, c)
	return nil
}

// appear makes a container one that clients see.
func (s *service) appear(c *container) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.abandoned {
		return fmt.Errorf("create container %s: %w", c.id, errAbandoned)
	}
	c.init.setState(statusCreated)
	return nil
}

// created announces a container that was created.
func (s *service) created(ctx context.Context, sb *sandbox.Sandbox, c *container) {
	close(c.known)
	s.saveState()
	s.events.send(&eventstypes.TaskCreate{
		ContainerID: c.id, Bundle: c.bundle, Pid: c.pid(),
		IO: &eventstypes.TaskIO{
			Stdin: c.init.stdio.Stdin, Stdout: c.init.stdio.Stdout, Stderr: c.init.stdio.Stderr, Terminal: c.init.stdio.Terminal,
		},
	})
	// Nil if the guest's events came first and told of the container's end.
	if a := c.currentAnchor(); a != nil {
		// The OCI runtime has made the mount points by now.
		if err := a.Bind(sb.Namespaces(), c.volumes...); err != nil {
			log.G(ctx).WithError(err).WithField("container", c.id).Warn("volumes are not seen below the container's host process")
		}
		go s.watchAnchor(c, a)
	}
}

// prepareHost mounts the root file system, starts the process that stands for
// the container, and runs the hooks that belong on the host.
func (s *service) prepareHost(ctx context.Context, sb *sandbox.Sandbox, c *container, rootfs []*types.Mount, undo *rollback) error {
	root := sb.EmptyDir()
	if !c.isPod {
		var err error
		if root, err = s.addRootfs(sb, c, rootfs); err != nil {
			return err
		}
	}
	var args []string
	if c.spec.Process != nil {
		args = c.spec.Process.Args
	}
	a, err := anchor.Start(sb.Namespaces(), anchor.Config{Args: args, Root: root})
	if err != nil {
		return fmt.Errorf("start anchor of container %s: %w", c.id, err)
	}
	c.setAnchor(a)
	// As with runc: what a createRuntime hook has set up, a poststop hook takes
	// down, whether the container came to be or not.
	undo.add(func(ctx context.Context) { s.runPoststop(ctx, c) })
	return s.runHooks(ctx, c, specs.StateCreating, hookPrestart, hookCreateRuntime)
}

// addRootfs mounts a container's root file system in the shared folder and
// returns its path on the host.
func (s *service) addRootfs(sb *sandbox.Sandbox, c *container, rootfs []*types.Mount) (string, error) {
	mounts := make([]mount.Mount, len(rootfs))
	for i, m := range rootfs {
		mounts[i] = mount.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options}
	}
	if len(mounts) == 0 {
		root, err := bundleRoot(c)
		if err != nil {
			return "", err
		}
		mounts = []mount.Mount{{Type: "bind", Source: root, Options: []string{"rbind", "rw"}}}
	}
	entry, err := sb.Share().AddRootfs(c.id, mounts)
	if err != nil {
		return "", fmt.Errorf("mount rootfs of container %s: %w", c.id, err)
	}
	c.rootfs = entry.Share
	return entry.Host, nil
}

// bundleRoot is the root file system of a bundle that came with no mounts.
func bundleRoot(c *container) (string, error) {
	if c.spec.Root == nil || c.spec.Root.Path == "" {
		return "", fmt.Errorf("container %s: OCI spec has no root path: %w", c.id, errdefs.ErrInvalidArgument)
	}
	if filepath.IsAbs(c.spec.Root.Path) {
		return c.spec.Root.Path, nil
	}
	return filepath.Join(c.bundle, c.spec.Root.Path), nil
}

// createInGuest hands the container to the guest's task service.
func (s *service) createInGuest(ctx context.Context, sb *sandbox.Sandbox, c *container, io *stdio.IO, undo *rollback) error {
	ctx, cancel := context.WithTimeout(ctx, createTimeout)
	defer cancel()
	plan, err := s.guestPlan(ctx, sb, c)
	if err != nil {
		return err
	}
	config, err := guestspec.Encode(plan.Spec)
	if err != nil {
		return err
	}
	undo.add(func(ctx context.Context) {
		if _, err := sb.Agent().RemoveBundle(ctx, &api.RemoveBundleRequest{Id: c.id}); err != nil {
			log.G(ctx).WithError(err).Debug("remove guest bundle")
		}
	})
	if _, err := sb.Agent().WriteBundle(ctx, &api.WriteBundleRequest{Id: c.id, Config: config}); err != nil {
		return fmt.Errorf("write bundle of container %s: %w", c.id, s.guestError(sb, err))
	}
	names, err := s.attach(ctx, sb, io)
	if err != nil {
		return err
	}
	options, err := typeurl.MarshalAnyToProto(&runcoptions.Options{BinaryName: api.Runtime})
	if err != nil {
		return err
	}
	c.init.enterGuest()
	resp, err := sb.Tasks().Create(ctx, &taskapi.CreateTaskRequest{
		ID: c.id, Bundle: api.BundlePath(c.id), Terminal: c.init.stdio.Terminal,
		Stdin: names.stdin, Stdout: names.stdout, Stderr: names.stderr, Options: options,
		Rootfs: []*types.Mount{{Type: "bind", Source: path.Join(api.GuestShare, c.rootfs), Options: []string{"rbind", "rw"}}},
	})
	if err != nil {
		return s.guestError(sb, nameSources(err, plan))
	}
	c.setGuestPid(resp.GetPid())
	return nil
}

// guestPlan rewrites the container's spec for the guest and shares the host
// paths that it names.
func (s *service) guestPlan(ctx context.Context, sb *sandbox.Sandbox, c *container) (*guestspec.Plan, error) {
	devices, err := sb.Agent().Devices(ctx, &api.Empty{})
	if err != nil {
		return nil, fmt.Errorf("list guest devices: %w", s.guestError(sb, err))
	}
	plan, err := s.rewrite(c, devices.GetDevices())
	if err != nil {
		return nil, err
	}
	for _, w := range plan.Warnings {
		log.G(ctx).WithField("container", c.id).Warn(w)
	}
	for _, n := range plan.Notes {
		log.G(ctx).WithField("container", c.id).Debug(n)
	}
	for i, b := range plan.Binds {
		entry, err := sb.Share().AddBind(c.id, b.Source, storage.BindOptions{
			Recursive: b.Recursive, ReadOnly: b.ReadOnly, ReadOnlyRecursive: b.RecursiveReadOnly, Slave: b.Slave,
			IDs: b.IDs, RecursiveIDs: b.RecursiveIDs,
			Memory: path.Clean(b.Destination) == "/dev/shm",
		})
		if err != nil {
			// In runc's words, which clients know.
			return nil, fmt.Errorf("OCI runtime create failed: error mounting %q to rootfs at %q: %w", b.Source, b.Destination, err)
		}
		if entry.Endpoint {
			log.G(ctx).WithField("container", c.id).Warnf("mount %s at %s: a socket or FIFO in a virtual machine does not reach processes of the host", b.Source, b.Destination)
		}
		plan.SetSource(i, path.Join(api.GuestShare, entry.Share))
		if entry.PartlyReadOnly {
			plan.SetPartlyReadOnly(i)
		}
		c.volumes = append(c.volumes, anchor.Bind{Source: entry.Host, Target: b.Destination})
	}
	return plan, nil
}

// nameSources returns an error of the guest's runtime about one of the plan's
// bind mounts in the words of runc, which name the host's source; the guest
// knows another.
func nameSources(err error, plan *guestspec.Plan) error {
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	p := st.Proto()
	for _, b := range plan.Binds {
		before, rest, found := strings.Cut(p.Message, "mount `"+plan.Spec.Mounts[b.Mount].Source+"` to `")
		_, cause, ended := strings.Cut(rest, "`")
		if found && ended {
			p.Message = fmt.Sprintf("%serror mounting %q to rootfs at %q%s", before, b.Source, b.Destination, cause)
			return status.ErrorProto(p)
		}
	}
	return err
}

// streamNames are the stdio fields of a request to the guest.
type streamNames struct{ stdin, stdout, stderr string }

// attach connects a process's streams to the guest. The names must go into the
// next request for it.
func (s *service) attach(ctx context.Context, sb *sandbox.Sandbox, io *stdio.IO) (streamNames, error) {
	var names streamNames
	var conns [3]stdio.Conn
	stdin, stdout, stderr := io.Wants()
	for i, st := range []struct {
		wanted bool
		name   string
		field  *string
	}{{stdin, "stdin", &names.stdin}, {stdout, "stdout", &names.stdout}, {stderr, "stderr", &names.stderr}} {
		if !st.wanted {
			continue
		}
		name := fmt.Sprintf("%s.%d", st.name, s.streams.Add(1))
		conn, err := sb.OpenStream(ctx, name)
		if err != nil {
			for _, c := range conns {
				if c != nil {
					c.Close()
				}
			}
			return streamNames{}, err
		}
		conns[i] = conn
		*st.field = api.StreamURL(name)
	}
	io.Attach(conns[0], conns[1], conns[2])
	return names, nil
}

// guestError is an error that a request to the guest returned; if the virtual
// machine has ended, that is the error.
func (s *service) guestError(sb *sandbox.Sandbox, err error) error {
	native := errgrpc.ToNative(err)
	if !errors.Is(native, errdefs.ErrUnknown) && !errdefs.IsUnavailable(native) {
		return native
	}
	// A connection breaks a moment before the end of its machine is noticed.
	timer := time.NewTimer(deathNotice)
	defer timer.Stop()
	if brokenConnection(err) {
		select {
		case <-sb.Dead():
		case <-timer.C:
		}
	}
	select {
	case <-sb.Dead():
		if why := sb.Err(); why != nil {
			return fmt.Errorf("virtual machine ended: %w: %w", why, errdefs.ErrUnavailable)
		}
	default:
	}
	return native
}
