package shim

import (
	"context"
	"io"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"

	"github.com/vmrt/vmrt/pkg/guestspec"
	"github.com/vmrt/vmrt/pkg/storage"
	"github.com/vmrt/vmrt/pkg/version"
)

// Info implements `shim -info`: what the runtime is and what it can do.
func (manager) Info(ctx context.Context, options io.Reader) (*types.RuntimeInfo, error) {
	f, err := typeurl.MarshalAnyToProto(ociFeatures())
	if err != nil {
		return nil, err
	}
	return &types.RuntimeInfo{
		Name:     RuntimeName,
		Version:  &types.RuntimeVersion{Version: version.Version, Revision: version.Revision},
		Features: f,
	}, nil
}

// ociFeatures says only what works: kubelet and containerd decide by it what
// they ask for. Id-mapped mounts are the host's, made before their files go to
// the guest.
func ociFeatures() *features.Features {
	yes, no := true, false
	mapsIDs := storage.MapsIDs()
	return &features.Features{
		OCIVersionMin: "1.0.0",
		OCIVersionMax: specs.Version,
		Hooks:         []string{hookPrestart, hookCreateRuntime, "startContainer", hookPoststart, hookPoststop},
		MountOptions:  guestspec.MountOptions(),
		Linux: &features.Linux{
			Namespaces: []string{"cgroup", "ipc", "mount", "network", "pid", "user", "uts"},
			Cgroup:     &features.Cgroup{V1: &no, V2: &yes, Systemd: &no, SystemdUser: &no, Rdma: &no},
			Seccomp:    &features.Seccomp{Enabled: &yes},
			Apparmor:   &features.Apparmor{Enabled: &no},
			Selinux:    &features.Selinux{Enabled: &no},
			IntelRdt:   &features.IntelRdt{Enabled: &no},
			MountExtensions: &features.MountExtensions{
				IDMap: &features.IDMap{Enabled: &mapsIDs},
			},
		},
	}
}
