package task

import (
	"encoding/json"
	"fmt"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmrt/vmrt/api"
)

// maxRootfs bounds the mounts of one Create.
const maxRootfs = 512

// invalid is the funnel of everything that a request cannot say.
func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %w", fmt.Errorf(format, args...), errdefs.ErrInvalidArgument)
}

// checkProcess checks the ids of a process; exec may be empty.
func checkProcess(id, exec string) (key, error) {
	if err := api.CheckID(id); err != nil {
		return key{}, invalid("container %w", err)
	}
	if exec != "" {
		if err := api.CheckID(exec); err != nil {
			return key{}, invalid("container %s: exec %w", id, err)
		}
	}
	return key{id, exec}, nil
}

func checkCreate(r *taskapi.CreateTaskRequest) error {
	if err := api.CheckID(r.ID); err != nil {
		return invalid("container %w", err)
	}
	switch {
	case r.Bundle != api.BundlePath(r.ID):
		return invalid("create container %s: bundle %q: want %q", r.ID, r.Bundle, api.BundlePath(r.ID))
	case r.Checkpoint != "" || r.ParentCheckpoint != "":
		return fmt.Errorf("create container %s from a checkpoint: %w", r.ID, errdefs.ErrNotImplemented)
	case len(r.Rootfs) > maxRootfs:
		return invalid("create container %s: %d rootfs mounts: at most %d", r.ID, len(r.Rootfs), maxRootfs)
	}
	return checkOptions(r.ID, r.Options)
}

// checkOptions refuses what the service would panic on: any message but its
// own options.
func checkOptions(id string, opts *anypb.Any) error {
	if opts == nil || len(opts.Value) == 0 {
		return invalid("create container %s: no runtime options", id)
	}
	var o options.Options
	if !typeurl.Is(opts, &o) {
		return invalid("create container %s: options are a %q: want %q", id, opts.TypeUrl, typeName(&o))
	}
	if err := typeurl.UnmarshalTo(opts, &o); err != nil {
		return invalid("create container %s: decode options: %w", id, err)
	}
	switch {
	case o.BinaryName != api.Runtime:
		return invalid("create container %s: runtime %q: want %q", id, o.BinaryName, api.Runtime)
	case o.SystemdCgroup:
		return invalid("create container %s: the guest has no systemd for cgroups", id)
	}
	return nil
}

func typeName(v any) string {
	u, err := typeurl.TypeURL(v)
	if err != nil {
		return err.Error()
	}
	return u
}

func checkExec(r *taskapi.ExecProcessRequest) error {
	k, err := checkProcess(r.ID, r.ExecID)
	switch {
	case err != nil:
		return err
	case r.ExecID == "":
		return invalid("exec in container %s: no exec id", r.ID)
	case r.ExecID == r.ID:
		// An exit event with this id would be the init's.
		return invalid("%s: the exec id is the container's", k)
	case r.Spec == nil:
		return invalid("%s: no process spec", k)
	case !json.Valid(r.Spec.Value):
		return invalid("%s: process spec is not JSON", k)
	}
	return nil
}
