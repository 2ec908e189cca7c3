package shim

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/api/cri"
	"github.com/vmrt/vmrt/pkg/config"
	"github.com/vmrt/vmrt/pkg/guestspec"
	"github.com/vmrt/vmrt/pkg/idmap"
)

// CRI says by this annotation what a container is: the pod itself, or one of
// the pod's containers.
const (
	annotationContainerType = "io.kubernetes.cri.container-type"
	containerTypeSandbox    = "sandbox"
)

// The annotations by which CRI says a pod's name.
const (
	annotationNamespace = "io.kubernetes.cri.sandbox-namespace"
	annotationName      = "io.kubernetes.cri.sandbox-name"
)

// podShmBytes is the size of a pod's /dev/shm where nobody says another, which
// is CRI's.
const podShmBytes = 64 << 20

// podShmSource stands for a pod's /dev/shm where there is none on the host.
const podShmSource = api.PodShm

// podConfig is what a virtual machine is made for.
type podConfig struct {
	// name is a pod's namespace and name, for messages.
	name  string
	netns string // a path; empty: a new one
	// hostNetwork: the host's network instead.
	hostNetwork bool
	// late: interfaces may arrive after the boot.
	late        bool
	cgroupsPath string
	limits      limits
	// ids are those of the user namespace that the containers have.
	ids idmap.Mapping
	// open is what the containers share; nil for a container by itself.
	open *api.OpenPodRequest
	// shm is the host path by which specs name the pod's /dev/shm; empty when
	// they do not.
	shm string
	// files are those that each container gets unless it brings its own, by
	// their paths in the container. Only the Sandbox API leaves them to us.
	files map[string]string
}

// isPod reports whether a container's spec is that of a pod.
func isPod(spec *specs.Spec) bool {
	return spec.Annotations[annotationContainerType] == containerTypeSandbox
}

// podOfSpec returns what the first container of a virtual machine asks for.
func podOfSpec(spec *specs.Spec) (*podConfig, error) {
	p := &podConfig{}
	if spec.Linux == nil {
		return nil, fmt.Errorf("linux must be specified: %w", errdefs.ErrInvalidArgument)
	}
	p.cgroupsPath = spec.Linux.CgroupsPath
	var err error
	if p.ids, err = guestspec.IDs(spec.Linux); err != nil {
		return nil, fmt.Errorf("user namespace: %w", err)
	}
	ns := map[specs.LinuxNamespaceType]string{}
	for _, n := range spec.Linux.Namespaces {
		ns[n.Type] = n.Path
	}
	path, ok := ns[specs.NetworkNamespace]
	p.netns, p.hostNetwork = path, !ok
	if p.hostNetwork {
		if err := guestspec.CheckHostSysctls(spec.Linux.Sysctl); err != nil {
			return nil, err
		}
	}
	if !isPod(spec) {
		p.limits = specLimits(spec.Linux.Resources)
		if path == "" && ok && !hasHooks(spec.Hooks, hookPrestart, hookCreateRuntime) {
			// Docker puts its interfaces there between Create and Start.
			p.late = true
		}
		return p, nil
	}
	p.name = spec.Annotations[annotationNamespace] + "/" + spec.Annotations[annotationName]
	if p.limits, err = annotatedLimits(spec.Annotations); err != nil {
		return nil, err
	}
	_, pid := ns[specs.PIDNamespace]
	p.open = &api.OpenPodRequest{Hostname: spec.Hostname, Domainname: spec.Domainname, Sysctls: spec.Linux.Sysctl, Pid: pid}
	if _, ok := ns[specs.IPCNamespace]; !ok {
		return p, nil // the virtual machine's own, with its /dev/shm
	}
	p.open.ShmBytes = podShmBytes
	for _, m := range spec.Mounts {
		if m.Destination == "/dev/shm" && filepath.IsAbs(m.Source) {
			p.shm = filepath.Clean(m.Source)
			p.open.ShmBytes = sizeOf(p.shm)
		}
	}
	return p, nil
}

// spareNICs is how many interfaces may arrive after the boot.
func (p *podConfig) spareNICs(settings *config.Config) int {
	if !p.late {
		return 0
	}
	return settings.LateInterfaces
}

// sizeOf returns the size of the file system at path, which CRI has mounted for
// the pod's shared memory.
func sizeOf(path string) uint64 {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil || st.Type != unix.TMPFS_MAGIC {
		return podShmBytes
	}
	return st.Blocks * uint64(st.Bsize)
}

// podOfCRI returns what the Sandbox API's request asks for.
func podOfCRI(id, netns string, options *anypb.Any) (*podConfig, error) {
	var cfg cri.PodSandboxConfig
	if options != nil {
		// The type's name; that of our own message is another.
		if name := options.TypeUrl[strings.LastIndex(options.TypeUrl, "/")+1:]; name != "runtime.v1.PodSandboxConfig" {
			return nil, fmt.Errorf("sandbox options of type %q: want runtime.v1.PodSandboxConfig: %w", options.TypeUrl, errdefs.ErrInvalidArgument)
		}
		if err := proto.Unmarshal(options.Value, &cfg); err != nil {
			return nil, fmt.Errorf("decode sandbox options: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	ns := cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()
	ids, err := criIDs(ns.GetUsernsOptions())
	if err != nil {
		return nil, fmt.Errorf("user namespace of the pod: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	sysctls := cfg.GetLinux().GetSysctls()
	hostNetwork := ns.GetNetwork() == cri.NamespaceMode_NODE
	if hostNetwork {
		netns = ""
		if err := guestspec.CheckHostSysctls(sysctls); err != nil {
			return nil, err
		}
	} else {
		sysctls = podSysctls(sysctls)
	}
	p := &podConfig{
		name:        cfg.GetMetadata().GetNamespace() + "/" + cfg.GetMetadata().GetName(),
		netns:       netns,
		hostNetwork: hostNetwork,
		cgroupsPath: criCgroup(cfg.GetLinux().GetCgroupParent(), id),
		limits:      criLimits(cfg.GetLinux()),
		ids:         ids,
		open: &api.OpenPodRequest{
			Hostname: cfg.GetHostname(),
			Sysctls:  sysctls,
			Pid:      ns.GetPid() != cri.NamespaceMode_NODE,
		},
	}
	if ns.GetIpc() != cri.NamespaceMode_NODE {
		p.open.ShmBytes = podShmBytes
		p.shm = podShmSource
	}
	if p.files, err = podFiles(&cfg); err != nil {
		return nil, err
	}
	if p.open.Hostname == "" {
		p.open.Hostname = strings.TrimSpace(p.files["/etc/hostname"])
	}
	return p, nil
}

// criIDs returns the ids of the pod's user namespace; zero for none.
func criIDs(o *cri.UserNamespace) (ids idmap.Mapping, err error) {
	if o == nil || o.GetMode() == cri.NamespaceMode_NODE {
		return ids, nil
	}
	if o.GetMode() != cri.NamespaceMode_POD {
		return ids, fmt.Errorf("mode %s: want POD or NODE", o.GetMode())
	}
	ids = idmap.Mapping{UIDs: criMappings(o.GetUids()), GIDs: criMappings(o.GetGids())}
	return ids, ids.Check()
}

func criMappings(list []*cri.IDMapping) (out []specs.LinuxIDMapping) {
	for _, e := range list {
		out = append(out, specs.LinuxIDMapping{ContainerID: e.GetContainerId(), HostID: e.GetHostId(), Size: e.GetLength()})
	}
	return out
}

// criCgroup returns the pod's cgroup as containerd names those of containers
// below a pod's parent: by path, or for systemd by slice, prefix and name.
func criCgroup(parent, id string) string {
	switch {
	case parent == "":
		return ""
	case strings.HasSuffix(filepath.Base(parent), ".slice"):
		return strings.Join([]string{filepath.Base(parent), "cri-containerd", id}, ":")
	}
	return filepath.Join(parent, id)
}

// podSysctls adds what containerd's CRI gives to every pod with a network of its
// own by default
// (enable_unprivileged_ports, enable_unprivileged_icmp).
func podSysctls(asked map[string]string) map[string]string {
	all := map[string]string{
		"net.ipv4.ip_unprivileged_port_start": "0",
		"net.ipv4.ping_group_range":           "0 2147483647",
	}
	for k, v := range asked {
		all[k] = v
	}
	return all
}

// podFiles returns /etc/hostname, /etc/hosts and /etc/resolv.conf as CRI makes
// them in its podsandbox mode.
func podFiles(cfg *cri.PodSandboxConfig) (map[string]string, error) {
	name := cfg.GetHostname()
	if name == "" {
		var err error
		if name, err = os.Hostname(); err != nil {
			return nil, fmt.Errorf("find the host's name: %w", err)
		}
	}
	hosts, err := readOptional("/etc/hosts")
	if err != nil {
		return nil, err
	}
	var resolv string
	if dns := cfg.GetDnsConfig(); dns != nil {
		resolv = resolvConf(dns)
	} else if resolv, err = readOptional("/etc/resolv.conf"); err != nil {
		return nil, err
	}
	return map[string]string{"/etc/hostname": name + "\n", "/etc/hosts": hosts, "/etc/resolv.conf": resolv}, nil
}

func readOptional(path string) (string, error) {
	b, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return "", nil
	}
	return string(b), err
}

// resolvConf is resolv.conf(5).
func resolvConf(dns *cri.DNSConfig) string {
	var b strings.Builder
	if len(dns.Searches) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(dns.Searches, " "))
	}
	for _, s := range dns.Servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if len(dns.Options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(dns.Options, " "))
	}
	return b.String()
}

// writeFiles writes the pod's files, which are its root's, into dir.
func (p *podConfig) writeFiles(dir string) error {
	if len(p.files) == 0 {
		return nil
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	uid, gid := p.ids.Root()
	for destination, content := range p.files {
		path := filepath.Join(dir, filepath.Base(destination))
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return err
		}
		if err := os.Chown(path, int(uid), int(gid)); err != nil {
			return err
		}
	}
	return nil
}

// addMounts adds to the spec of a container of the pod what the Sandbox API
// leaves to the runtime: the pod's files, which writeFiles has put into dir,
// and, for a container in the pod's ipc namespace, the pod's /dev/shm instead of
// one of its own.
func (p *podConfig) addMounts(spec *specs.Spec, dir string) {
	if len(p.files) == 0 {
		return
	}
	if p.open.ShmBytes > 0 && joins(spec, specs.IPCNamespace) {
		for i, m := range spec.Mounts {
			if filepath.Clean(m.Destination) == "/dev/shm" && m.Type == "tmpfs" {
				spec.Mounts[i] = specs.Mount{
					Destination: m.Destination, Type: "bind", Source: p.shm, Options: []string{"rbind", "rprivate", "rw"},
				}
			}
		}
	}
	has := func(destination string) bool {
		return slices.ContainsFunc(spec.Mounts, func(m specs.Mount) bool {
			return filepath.Clean(m.Destination) == destination
		})
	}
	for _, destination := range slices.Sorted(maps.Keys(p.files)) {
		if has(destination) {
			continue
		}
		mode := "rw"
		if spec.Root != nil && spec.Root.Readonly {
			mode = "ro"
		}
		spec.Mounts = append(spec.Mounts, specs.Mount{
			Destination: destination, Type: "bind", Source: filepath.Join(dir, filepath.Base(destination)),
			Options: []string{"rbind", "rprivate", mode},
		})
	}
}

// joins reports whether the container joins a namespace that exists.
func joins(spec *specs.Spec, kind specs.LinuxNamespaceType) bool {
	return spec.Linux != nil && slices.ContainsFunc(spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool {
		return n.Type == kind && n.Path != ""
	})
}
