package guestspec

import (
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/pkg/idmap"
)

// options are a mount's options, read as runc's parseMountOptions does: of
// contradicting ones the last counts.
type options struct {
	// spec are the options as they came, kept those for the guest.
	spec, kept []string
	// data are those that only the file system knows.
	data                        []string
	bind, recursive             bool
	readOnly, recursiveReadOnly bool
	slave                       bool
	// shared is the option that asks for shared propagation.
	shared string
	// ids are to be mapped, recursively or not.
	ids          idmap.Mapping
	recursiveIDs bool
}

// flagOptions are the options that OCI runtimes take themselves, in place of
// handing them to the file system (OCI runtime-spec 1.3, config.md, "Linux
// mount options").
var flagOptions = []string{
	"async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "mand", "noatime",
	"nodev", "nodiratime", "noexec", "nomand", "norelatime", "nostrictatime", "nosuid", "private",
	"ratime", "rbind", "rdev", "rdiratime", "relatime", "rexec", "rnoatime", "rnodev", "rnodiratime",
	"rnoexec", "rnorelatime", "rnostrictatime", "rnosuid", "ro", "rprivate", "rrelatime", "rro", "rrw",
	"rshared", "rslave", "rstrictatime", "rsuid", "runbindable", "rw", "shared", "slave",
	"strictatime", "suid", "sync", "tmpcopyup", "unbindable",
}

// inertOptions have no effect on any mount that reaches the guest: they turn
// off what is off, or tune what neither tmpfs nor virtio-fs has. OCI runtimes
// that do not know them would hand them to the file system, which fails.
var inertOptions = []string{
	"silent", "loud", "iversion", "noiversion", "lazytime", "nolazytime", "symfollow", "rsymfollow",
}

// MountOptions lists the options that Rewrite accepts and that have the effect
// that they have with runc, for the runtime's OCI features.
func MountOptions() []string {
	all := []string{"idmap", "ridmap"}
	for _, o := range flagOptions {
		if o != "shared" && o != "rshared" { // not towards the host
			all = append(all, o)
		}
	}
	return all
}

// refusedOptions change what a container may do or sees, and cannot be had.
var refusedOptions = map[string]string{
	"nosymfollow":  "not available in a virtual machine",
	"rnosymfollow": "not available in a virtual machine",
	"remount":      "not available in a virtual machine",
}

func (m *mounter) parseOptions(mnt specs.Mount) (options, error) {
	o := options{spec: mnt.Options}
	mapped := len(mnt.UIDMappings) > 0 || len(mnt.GIDMappings) > 0
	for _, opt := range mnt.Options {
		switch {
		case refusedOptions[opt] != "":
			return o, unsupported("mount %s at %s: option %s: %s", mnt.Source, mnt.Destination, opt, refusedOptions[opt])
		case opt == "idmap" || opt == "ridmap":
			mapped, o.recursiveIDs = true, opt == "ridmap"
			continue // by the host
		case slices.Contains(inertOptions, opt):
			m.note("mount %s at %s: option %s has no effect", mnt.Source, mnt.Destination, opt)
			continue
		case isLabel(opt):
			m.warn("mount %s at %s: option %s is not applied: the virtual machine has no SELinux", mnt.Source, mnt.Destination, opt)
			continue
		case opt == "tmpcopyup" && mnt.Type != "tmpfs":
			continue // runc ignores it there.
		case slices.Contains(flagOptions, opt):
			o.flag(opt)
		default:
			o.data = append(o.data, opt)
		}
		o.kept = append(o.kept, opt)
	}
	if !mapped {
		return o, nil
	}
	return o, m.mapIDs(&o, mnt)
}

// mapIDs sets the ids of an id-mapped mount: its own, or else those of the
// container's user namespace. The words are runc's (libcontainer/configs/validate).
func (m *mounter) mapIDs(o *options, mnt specs.Mount) error {
	o.ids = idmap.Mapping{UIDs: mnt.UIDMappings, GIDs: mnt.GIDMappings}
	if o.ids.IsZero() {
		o.ids = m.ids
	}
	switch {
	case !o.bind && mnt.Type != "bind":
		return invalid("mount %s at %s: id-mapped mounts are only supported for bind-mounts", mnt.Source, mnt.Destination)
	case len(o.ids.UIDs) == 0 || len(o.ids.GIDs) == 0:
		return invalid("mount %s at %s: id-mapped mounts must have both uid and gid mappings specified", mnt.Source, mnt.Destination)
	}
	return nil
}

func (o *options) flag(opt string) {
	switch opt {
	case "bind":
		o.bind = true
	case "rbind":
		o.bind, o.recursive = true, true
	case "ro":
		o.readOnly = true
	case "rw":
		o.readOnly = false
	case "rro":
		o.recursiveReadOnly = true
	case "rrw":
		o.recursiveReadOnly, o.readOnly = false, false
	case "shared", "rshared":
		o.shared, o.slave = opt, false
	case "slave", "rslave":
		o.shared, o.slave = "", true
	case "private", "rprivate", "unbindable", "runbindable":
		o.shared, o.slave = "", false
	}
}

// isLabel reports whether opt is one of SELinux's mount options.
func isLabel(opt string) bool {
	name, _, _ := strings.Cut(opt, "=")
	return slices.Contains([]string{"context", "fscontext", "defcontext", "rootcontext", "seclabel"}, name)
}
