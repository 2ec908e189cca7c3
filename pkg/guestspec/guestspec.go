package guestspec

import (
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strconv"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/idmap"
)

// Input is what Rewrite starts from. Rewrite keeps no reference to it.
type Input struct {
	// ID is the container's id; api.CheckID holds for it.
	ID string
	// Bundle is the container's bundle on the host, absolute. Relative
	// sources of bind mounts are relative to it.
	Bundle string
	// Spec is the container's config.json.
	Spec *specs.Spec
	// GuestDevices is what the agent's Devices returned.
	GuestDevices []*api.Device
	// PodNamespaces maps the path of a namespace on the host to the guest's
	// path of the namespace that stands for it. Empty outside pods.
	PodNamespaces map[string]string
	// PodMounts maps the source of a bind mount on the host to the guest's
	// path of what stands for it. Empty outside pods.
	PodMounts map[string]string
	// IDs are those of the virtual machine's user namespace; zero for none.
	IDs idmap.Mapping
}

// Plan is what Rewrite returns: the guest's spec and what the host has to do
// for it. The caller owns all of it.
type Plan struct {
	// Spec is for the OCI runtime in the guest.
	Spec *specs.Spec
	// Binds are the host's files and directories that Spec mounts, in mount
	// order. Spec already names SharePath(id, i) as the source of Binds[i].
	Binds []Bind
	// NetNS is the path of the host's network namespace that the container
	// is to join, or empty for a new one.
	NetNS string
	// HostNetwork: the container is to have the host's network instead.
	HostNetwork bool
	// Hooks holds the hooks that run on the host: Prestart, CreateRuntime,
	// Poststart and Poststop. The other lists are empty.
	Hooks specs.Hooks
	// Warnings are what the spec asks for and the container does not get.
	// Notes are of interest to who debugs only.
	Warnings, Notes []string
}

// Bind is a bind mount whose source is on the host.
type Bind struct {
	// Mount is the index in Plan.Spec.Mounts, and in Input.Spec.Mounts.
	Mount int
	// Source is absolute and clean; nothing is known of what it is, nor
	// whether it exists.
	Source string
	// Destination is the path in the container.
	Destination string
	// ReadOnly: the container may not write to Source.
	ReadOnly bool
	// Recursive: mounts below Source are seen too.
	Recursive bool
	// RecursiveReadOnly: the container may not write to those mounts either.
	RecursiveReadOnly bool
	// Slave: mounts that the host makes below Source later are seen too.
	Slave bool
	// IDs are to be mapped: an owner of a file of Source, by its id in the
	// namespace, is seen as the one outside. Zero: the owners as they are.
	IDs idmap.Mapping
	// RecursiveIDs: on the mounts below Source too.
	RecursiveIDs bool
	// Options are the mount's options as the spec has them.
	Options []string
}

// CgroupRoot is the guest's cgroup that holds one child for each container.
const CgroupRoot = "/vmrt"

// guestVersion is the guest's ociVersion. OCI runtimes read every field that
// they know, whatever the version, but crun before 1.20 takes 1.0 alone.
const guestVersion = "1.0.2"

// SharePath returns the guest's path of the i-th bind of a container.
func SharePath(id string, i int) string {
	return path.Join(api.GuestShare, id, "mounts", strconv.Itoa(i))
}

// SetSource makes guestPath the source of Binds[i] in place of SharePath.
func (p *Plan) SetSource(i int, guestPath string) {
	p.Spec.Mounts[p.Binds[i].Mount].Source = guestPath
}

// SetPartlyReadOnly is for a read-only Binds[i] with mounts below it that are
// not: the guest sees all of them as one file system, so what is read-only is
// left to the host, which has it enforced.
func (p *Plan) SetPartlyReadOnly(i int) {
	m := &p.Spec.Mounts[p.Binds[i].Mount]
	m.Options = slices.DeleteFunc(m.Options, func(o string) bool { return o == "ro" })
}

// Rewrite turns a container's spec into the guest's.
func Rewrite(in Input) (*Plan, error) {
	if err := checkInput(in); err != nil {
		return nil, err
	}
	src, err := clone(in.Spec)
	if err != nil {
		return nil, fmt.Errorf("copy spec of container %s: %w", in.ID, err)
	}
	var rep report
	plan := &Plan{Spec: &specs.Spec{
		Version:    guestVersion,
		Root:       &specs.Root{Path: "rootfs", Readonly: src.Root.Readonly},
		Hostname:   src.Hostname,
		Domainname: src.Domainname,
	}}
	plan.Spec.Process = rewriteProcess(src.Process, &rep)
	if plan.Spec.Linux, err = rewriteLinux(in, src, &rep); err != nil {
		return nil, err
	}
	plan.NetNS, plan.HostNetwork = networkNamespace(src.Linux.Namespaces)
	m := mounter{bundle: in.Bundle, id: in.ID, devices: in.GuestDevices, pod: in.PodMounts, report: &rep}
	m.ids = idmap.Mapping{UIDs: src.Linux.UIDMappings, GIDs: src.Linux.GIDMappings}
	if plan.Spec.Mounts, err = m.rewrite(src.Mounts); err != nil {
		return nil, err
	}
	plan.Binds = m.binds
	if plan.Hooks, plan.Spec.Hooks, err = splitHooks(src.Hooks); err != nil {
		return nil, err
	}
	noteSections(src, &rep)
	plan.Warnings, plan.Notes = rep.warnings, rep.notes
	return plan, nil
}

// Check finds what Rewrite would refuse without knowing the guest, so that it
// is told before anything is started or any hook has run. in.GuestDevices,
// in.PodNamespaces and in.IDs are not looked at. Nil does not mean that Rewrite succeeds.
func Check(in Input) error {
	if err := checkInput(in); err != nil {
		return err
	}
	if err := checkLinux(in.Spec.Linux); err != nil {
		return err
	}
	if _, err := IDs(in.Spec.Linux); err != nil {
		return err
	}
	if _, host := networkNamespace(in.Spec.Linux.Namespaces); host {
		if err := CheckHostSysctls(in.Spec.Linux.Sysctl); err != nil {
			return err
		}
	}
	if _, _, err := RewriteResources(in.Spec.Linux.Resources); in.Spec.Linux.Resources != nil && err != nil {
		return err
	}
	_, _, err := splitHooks(in.Spec.Hooks)
	return err
}

// checkInput finds what is missing, in the order in which runc does.
func checkInput(in Input) error {
	if err := api.CheckID(in.ID); err != nil {
		return invalid("container %s", err)
	}
	s := in.Spec
	switch {
	case s == nil:
		return invalid("spec must not be empty")
	case !filepath.IsAbs(in.Bundle):
		return invalid("bundle %q of container %s: not an absolute path", in.Bundle, in.ID)
	}
	if err := checkProcess(s.Process); err != nil {
		return err
	}
	switch {
	case s.Root == nil:
		return invalid("root must be specified")
	case s.Linux == nil:
		return invalid("linux must be specified")
	}
	return nil
}

// rewriteLinux names every field that is kept; one that a newer runtime-spec
// adds does not reach the guest unseen.
func rewriteLinux(in Input, src *specs.Spec, rep *report) (*specs.Linux, error) {
	l := src.Linux
	if err := checkLinux(l); err != nil {
		return nil, err
	}
	if err := checkIDs(l, in.IDs); err != nil {
		return nil, err
	}
	out := &specs.Linux{
		UIDMappings:       l.UIDMappings, // crun gives the cgroup to their root
		GIDMappings:       l.GIDMappings,
		Sysctl:            l.Sysctl,
		CgroupsPath:       path.Join(CgroupRoot, in.ID),
		RootfsPropagation: l.RootfsPropagation,
		MaskedPaths:       l.MaskedPaths,
		ReadonlyPaths:     l.ReadonlyPaths,
		Personality:       l.Personality,
		TimeOffsets:       l.TimeOffsets,
	}
	var err error
	if out.Namespaces, err = rewriteNamespaces(src, in.PodNamespaces); err != nil {
		return nil, err
	}
	if out.Seccomp, err = rewriteSeccomp(l.Seccomp); err != nil {
		return nil, err
	}
	if out.Resources, err = rewriteResources(l.Resources, rep); err != nil {
		return nil, err
	}
	if err := rewriteDevices(out, src, in.GuestDevices, rep); err != nil {
		return nil, err
	}
	if l.MountLabel != "" {
		rep.warn("mountLabel %s is not applied: the virtual machine has no SELinux", l.MountLabel)
	}
	if l.MemoryPolicy != nil {
		rep.warn("memoryPolicy %s is not applied: it names memory nodes of the host", l.MemoryPolicy.Mode)
	}
	return out, nil
}

// propagations are runc's values of rootfsPropagation.
var propagations = []string{"private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable"}

func checkLinux(l *specs.Linux) error {
	if p := l.RootfsPropagation; p != "" && !slices.Contains(propagations, p) {
		return invalid("rootfsPropagation=%v is not supported", p)
	}
	if s := l.Seccomp; s != nil && s.ListenerPath != "" {
		return unsupported("seccomp listener %s: a listener on the host cannot serve a container in a virtual machine", s.ListenerPath)
	}
	if l.IntelRdt != nil {
		return unsupported("intelRdt is specified in config, but Intel RDT is not available in a virtual machine")
	}
	for _, name := range slices.Sorted(maps.Keys(l.NetDevices)) {
		return unsupported("network device %s: devices of the host cannot be moved into a virtual machine", name)
	}
	return nil
}

// noteSections records sections that are not for Linux containers.
func noteSections(s *specs.Spec, rep *report) {
	if s.VM != nil {
		rep.warn("the spec's vm section is not used: the runtime's configuration sets the virtual machine")
	}
	for _, o := range []struct {
		name string
		set  bool
	}{
		{"solaris", s.Solaris != nil}, {"windows", s.Windows != nil},
		{"zos", s.ZOS != nil}, {"freebsd", s.FreeBSD != nil},
	} {
		if o.set {
			rep.note("the spec's %s section is not for Linux", o.name)
		}
	}
}

// clone copies v deeply, so that neither side sees the other's changes. What
// JSON leaves out would not reach the guest either.
func clone[T any](v *T) (*T, error) {
	if v == nil {
		return nil, nil
	}
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	if hasNUL(b) {
		return nil, invalid("a string contains a null byte")
	}
	out := new(T)
	return out, json.Unmarshal(b, out)
}

// hasNUL reports whether a string in the JSON text b has a NUL: an OCI runtime
// in C would take the string for a shorter one.
func hasNUL(b []byte) bool {
	for i := 0; i+1 < len(b); i++ {
		if b[i] != '\\' {
			continue
		}
		i++ // The escaped character, so that `\\u0000` is none.
		if b[i] == 'u' && i+4 < len(b) && string(b[i+1:i+5]) == "0000" {
			return true
		}
	}
	return false
}
