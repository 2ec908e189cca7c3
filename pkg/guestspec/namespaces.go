package guestspec

import (
	"maps"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/idmap"
)

// guestNetNS is the agent's network namespace. The path, in place of no network
// namespace at all, tells the OCI runtime that the namespace is the container's
// to configure: it permits net.* sysctls.
const guestNetNS = "/proc/1/ns/net"

// rewriteNamespaces checks the spec's namespaces and returns the guest's, in
// the same order.
func rewriteNamespaces(s *specs.Spec, pod map[string]string) ([]specs.LinuxNamespace, error) {
	seen := map[specs.LinuxNamespaceType]bool{}
	var out []specs.LinuxNamespace
	for _, ns := range s.Linux.Namespaces {
		if seen[ns.Type] {
			return nil, invalid("malformed spec file: duplicated ns %q", ns.Type)
		}
		seen[ns.Type] = true
		guest, err := rewriteNamespace(ns, pod)
		if err != nil {
			return nil, err
		}
		out = append(out, guest)
	}
	if hidesCgroups(s, seen) {
		out = append(out, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	return out, checkNamespaces(s, seen)
}

// hidesCgroups reports whether a spec that has no cgroup namespace needs one in
// the guest. On a host with cgroup v1, where clients ask for none, an OCI
// runtime shows a container its own cgroups; on v2, which the guest has, it
// does so in a namespace only.
func hidesCgroups(s *specs.Spec, has map[specs.LinuxNamespaceType]bool) bool {
	return !has[specs.CgroupNamespace] && !isPrivileged(s)
}

func rewriteNamespace(ns specs.LinuxNamespace, pod map[string]string) (specs.LinuxNamespace, error) {
	switch ns.Type {
	case specs.NetworkNamespace:
		return specs.LinuxNamespace{Type: ns.Type, Path: guestNetNS}, nil
	case specs.UserNamespace:
		// IDs has checked that it is the pod's, whatever its path.
		return specs.LinuxNamespace{Type: ns.Type, Path: api.PodNamespaces + "/user"}, nil
	case specs.MountNamespace, specs.PIDNamespace, specs.IPCNamespace, specs.UTSNamespace,
		specs.CgroupNamespace, specs.TimeNamespace:
	default:
		return ns, invalid("namespace %q does not exist", ns.Type)
	}
	if ns.Path == "" {
		return ns, nil
	}
	guest, ok := pod[ns.Path]
	if !ok || ns.Type == specs.MountNamespace {
		return ns, outside(ns)
	}
	return specs.LinuxNamespace{Type: ns.Type, Path: guest}, nil
}

// IDs returns the ids of the container's user namespace; zero if it has none.
// The words of its errors are runc's. A namespace that has a path comes with
// its ids too (containerd, CRI-O), and is known by them: its process is none of
// the virtual machine's.
func IDs(l *specs.Linux) (idmap.Mapping, error) {
	ids := idmap.Mapping{UIDs: l.UIDMappings, GIDs: l.GIDMappings}
	i := slices.IndexFunc(l.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.UserNamespace })
	switch {
	case i < 0 && ids.IsZero():
		return ids, nil
	case i < 0:
		return ids, invalid("user namespace mappings specified, but user namespace isn't enabled in the config")
	case ids.IsZero() && l.Namespaces[i].Path == "":
		return ids, invalid("user namespaces enabled, but no namespace path to join nor mappings to apply specified")
	case ids.IsZero():
		return ids, outside(l.Namespaces[i])
	}
	if err := ids.Check(); err != nil {
		return ids, invalid("%s", err)
	}
	return ids, nil
}

// checkIDs returns an error if the container's user namespace is another than
// that of its virtual machine.
func checkIDs(l *specs.Linux, pod idmap.Mapping) error {
	ids, err := IDs(l)
	if err != nil || ids.IsZero() || ids.Equal(pod) {
		return err
	}
	if pod.IsZero() {
		return unsupported("user namespace: the first container of the virtual machine must have it")
	}
	return unsupported("user namespace of uids %s and gids %s: that of the virtual machine has %s and %s",
		idmap.Format(ids.UIDs), idmap.Format(ids.GIDs), idmap.Format(pod.UIDs), idmap.Format(pod.GIDs))
}

// outside is the error for a namespace of a process on the host.
func outside(ns specs.LinuxNamespace) error {
	return unsupported("%s namespace %s: a namespace outside the virtual machine cannot be joined", ns.Type, ns.Path)
}

// checkNamespaces finds what needs a namespace that is not there. Its order
// and words are runc's (libcontainer/configs/validate).
func checkNamespaces(s *specs.Spec, has map[specs.LinuxNamespaceType]bool) error {
	l := s.Linux
	switch {
	case !has[specs.MountNamespace]:
		return invalid("mount namespace: a container in a virtual machine needs one of its own")
	case s.Hostname != "" && !has[specs.UTSNamespace]:
		return invalid("unable to set hostname without a private UTS namespace")
	case s.Domainname != "" && !has[specs.UTSNamespace]:
		return invalid("unable to set domainname without a private UTS namespace")
	case len(l.TimeOffsets) > 0 && !has[specs.TimeNamespace]:
		return invalid("time namespace offsets specified, but time namespace isn't enabled in the config")
	}
	if !has[specs.NetworkNamespace] {
		return CheckHostSysctls(l.Sysctl)
	}
	return nil
}

// networkNamespace returns the path of the network namespace on the host, empty
// for a new one, and whether it is the host's own that the spec asks for.
func networkNamespace(list []specs.LinuxNamespace) (path string, host bool) {
	for _, ns := range list {
		if ns.Type == specs.NetworkNamespace {
			return ns.Path, false
		}
	}
	return "", true
}

// CheckHostSysctls returns an error if there are sysctls that a container or
// pod without a network namespace may not set. The words are runc's.
func CheckHostSysctls(sysctls map[string]string) error {
	for _, name := range slices.Sorted(maps.Keys(sysctls)) {
		if strings.HasPrefix(strings.ReplaceAll(name, "/", "."), "net.") {
			return invalid("sysctl %q not allowed in host network namespace", name)
		}
	}
	return nil
}
