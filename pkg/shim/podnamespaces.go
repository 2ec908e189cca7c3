package shim

import (
	"fmt"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/guestspec"
	"github.com/vmrt/vmrt/pkg/idmap"
)

// Namespaces that the containers of a pod can share, by their names in /proc.
var sharedNamespaces = []string{"ipc", "uts", "pid"}

// podPaths returns what stands in the guest for the paths on the host by which
// containerd names what is shared: the namespaces of the pod's processes, and
// its /dev/shm. Processes are named by the pids that the shim has reported.
func (s *service) podPaths() (namespaces, mounts map[string]string) {
	namespaces, mounts = map[string]string{}, map[string]string{}
	s.mu.Lock()
	defer s.mu.Unlock()
	add := func(pid uint32, kind, guest string) {
		if pid != 0 {
			namespaces[fmt.Sprintf("/proc/%d/ns/%s", pid, kind)] = guest
		}
	}
	for _, c := range s.containers {
		pid := c.pid()
		for _, kind := range sharedNamespaces {
			switch {
			case c.isPod:
				add(pid, kind, s.pod.namespace(kind))
			case c.guestPid() != 0:
				add(pid, kind, fmt.Sprintf("/proc/%d/ns/%s", c.guestPid(), kind))
			}
		}
	}
	if s.api != nil {
		for _, kind := range sharedNamespaces {
			add(s.api.pid(), kind, s.pod.namespace(kind))
		}
	}
	if s.pod != nil && s.pod.shm != "" {
		mounts[s.pod.shm] = api.PodShm
	}
	return namespaces, mounts
}

// namespace returns the guest's path of one of the pod's namespaces: the
// virtual machine's own where the pod asked for the host's.
func (p *podConfig) namespace(kind string) string {
	own := map[string]bool{"ipc": p.open.ShmBytes > 0, "uts": true, "pid": p.open.Pid}
	if own[kind] {
		return api.PodNamespaces + "/" + kind
	}
	return "/proc/1/ns/" + kind
}

// rewrite turns a container's spec into the guest's.
func (s *service) rewrite(c *container, devices []*api.Device) (*guestspec.Plan, error) {
	spec := *c.spec
	spec.Mounts = slices.Clone(spec.Mounts)
	s.mu.Lock()
	var ids idmap.Mapping
	hostNetwork := false
	if s.pod != nil {
		ids, hostNetwork = s.pod.ids, s.pod.hostNetwork
	}
	if s.sandbox != nil && s.pod != nil {
		s.pod.addMounts(&spec, s.sandbox.FilesDir())
	}
	s.mu.Unlock()
	in := guestspec.Input{ID: c.id, Bundle: c.bundle, Spec: &spec, GuestDevices: devices, IDs: ids}
	in.PodNamespaces, in.PodMounts = s.podPaths()
	plan, err := guestspec.Rewrite(in)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", c.id, err)
	}
	if plan.HostNetwork && !hostNetwork {
		return nil, fmt.Errorf("container %s: it asks for the host's network, and its pod has one of its own: %w", c.id, errdefs.ErrInvalidArgument)
	}
	return plan, nil
}
