package guestspec

import (
	"path"
	"path/filepath"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/idmap"
)

// sourceless are file systems that need nothing of the host.
var sourceless = []string{
	"tmpfs", "ramfs", "proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2", "devtmpfs",
	"debugfs", "tracefs", "securityfs", "bpf", "configfs", "fusectl", "binfmt_misc", "hugetlbfs",
}

// mounter rewrites a spec's mounts.
type mounter struct {
	bundle, id string
	devices    []*api.Device
	pod        map[string]string
	ids        idmap.Mapping // of the container's user namespace
	binds      []Bind
	*report
}

// rewrite returns the guest's mounts, index by index those of the spec.
func (m *mounter) rewrite(mounts []specs.Mount) ([]specs.Mount, error) {
	var out []specs.Mount
	for i, mnt := range mounts {
		guest, err := m.rewriteOne(i, mnt)
		if err != nil {
			return nil, err
		}
		out = append(out, guest)
	}
	return out, nil
}

func (m *mounter) rewriteOne(i int, mnt specs.Mount) (specs.Mount, error) {
	if mnt.Destination == "" {
		return mnt, invalid("mount %s: no destination", mnt.Source)
	}
	if !path.IsAbs(mnt.Destination) {
		m.warn("mount destination %s is not absolute: taken as relative to /", mnt.Destination)
		mnt.Destination = path.Join("/", mnt.Destination)
	}
	opts, err := m.parseOptions(mnt)
	if err != nil {
		return mnt, err
	}
	out := specs.Mount{Destination: mnt.Destination, Type: mnt.Type, Source: mnt.Source, Options: opts.kept}
	switch {
	case opts.bind || mnt.Type == "bind":
		return m.bind(i, out, opts)
	case mnt.Type == "":
		return mnt, invalid("mount %s at %s: no type, nor bind among the options", mnt.Source, mnt.Destination)
	case slices.Contains(sourceless, mnt.Type):
		if path.IsAbs(out.Source) {
			out.Source = out.Type // A label only, which must not tell the host's paths.
		}
		return out, nil
	}
	return mnt, unsupported("mount %s at %s: file system type %s cannot be mounted in a virtual machine; mount it on the host and bind it",
		mnt.Source, mnt.Destination, mnt.Type)
}

// bind rewrites a bind mount: mnt has the source of the host and the options
// of the guest.
func (m *mounter) bind(i int, mnt specs.Mount, opts options) (specs.Mount, error) {
	mnt.Type = "bind"
	if !opts.bind {
		mnt.Options = append([]string{"bind"}, mnt.Options...)
	}
	if mnt.Source == "" {
		return mnt, invalid("mount at %s: no source", mnt.Destination)
	}
	if len(opts.data) > 0 {
		return mnt, invalid("mount %s at %s: bind mounts cannot have any filesystem-specific options applied: %s",
			mnt.Source, mnt.Destination, strings.Join(opts.data, ","))
	}
	if !filepath.IsAbs(mnt.Source) {
		mnt.Source = filepath.Join(m.bundle, mnt.Source)
	}
	mnt.Source = filepath.Clean(mnt.Source)
	if guest, ok := m.pod[mnt.Source]; ok {
		m.note("mount %s at %s is the pod's own", mnt.Source, mnt.Destination)
		mnt.Source = guest
		return mnt, nil
	}
	if ofGuest(mnt.Source) {
		if !opts.ids.IsZero() {
			return mnt, unsupported("mount %s at %s: the virtual machine's own files cannot be id-mapped", mnt.Source, mnt.Destination)
		}
		if !m.inGuest(mnt.Source) {
			return mnt, unsupported("mount %s at %s: not present in the virtual machine", mnt.Source, mnt.Destination)
		}
		m.note("mount %s at %s is the virtual machine's own", mnt.Source, mnt.Destination)
		return mnt, nil
	}
	if opts.shared != "" {
		return mnt, unsupported("mount %s at %s: option %s: mounts made in a virtual machine cannot propagate to the host",
			mnt.Source, mnt.Destination, opts.shared)
	}
	m.binds = append(m.binds, Bind{
		Mount:             i,
		Source:            mnt.Source,
		Destination:       mnt.Destination,
		ReadOnly:          opts.readOnly || opts.recursiveReadOnly,
		Recursive:         opts.recursive,
		RecursiveReadOnly: opts.recursiveReadOnly,
		Slave:             opts.slave,
		IDs:               opts.ids,
		RecursiveIDs:      opts.recursiveIDs,
		Options:           opts.spec,
	})
	mnt.Source = SharePath(m.id, len(m.binds)-1)
	return mnt, nil
}

// below reports whether the clean path p is dir or below it.
func below(p, dir string) bool {
	return p == dir || strings.HasPrefix(p, dir+"/")
}

// ofGuest reports whether a bind source names a file of the kernel's, of which
// the virtual machine has its own. Files below /dev/shm are data.
func ofGuest(source string) bool {
	return below(source, "/proc") || below(source, "/sys") ||
		below(source, "/dev") && !strings.HasPrefix(source, "/dev/shm/")
}

// guestDirs are the folders of the guest's /dev that hold no device nodes.
var guestDirs = []string{"/dev", "/dev/pts", "/dev/shm", "/dev/mqueue"}

// inGuest reports whether the guest has its own of a source that is ofGuest,
// as far as can be told without asking it.
func (m *mounter) inGuest(source string) bool {
	switch {
	case below(source, "/sys"):
		return true
	case below(source, "/proc"):
		return !ofProcess(source)
	case slices.Contains(guestDirs, source):
		return true
	}
	for _, d := range m.devices {
		if d.GetPath() == source {
			return portable(d)
		}
		if below(d.GetPath(), source) {
			return true // A folder of devices.
		}
	}
	return false
}

// ofProcess reports whether a path below /proc belongs to one process.
func ofProcess(source string) bool {
	first, _, _ := strings.Cut(strings.TrimPrefix(source, "/proc/"), "/")
	return first == "self" || first == "thread-self" || strings.Trim(first, "0123456789") == "" && first != ""
}
