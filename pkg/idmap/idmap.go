// Package idmap is about the ids of user namespaces: which user and group in
// one stand for which outside (user_namespaces(7)). Both sides of a virtual
// machine use it.
//
// Its types are plain data; functions may be called from any goroutine.
package idmap

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// MaxExtents bounds the extents of the users, and those of the groups. The
// kernel would take 340; these have to fit into a virtual machine's command
// line.
const MaxExtents = 16

// Mapping is the mapping of a user namespace. Outside ids are the host's, and
// also those of the virtual machine, whose users are the host's. The zero
// value stands for no user namespace.
type Mapping struct {
	UIDs, GIDs []specs.LinuxIDMapping
}

// IsZero reports whether there is no mapping.
func (m Mapping) IsZero() bool { return len(m.UIDs) == 0 && len(m.GIDs) == 0 }

// Equal reports whether both map all ids alike.
func (m Mapping) Equal(o Mapping) bool {
	return slices.Equal(sorted(m.UIDs), sorted(o.UIDs)) && slices.Equal(sorted(m.GIDs), sorted(o.GIDs))
}

func sorted(list []specs.LinuxIDMapping) []specs.LinuxIDMapping {
	list = slices.Clone(list)
	slices.SortFunc(list, func(a, b specs.LinuxIDMapping) int { return int(int64(a.ContainerID) - int64(b.ContainerID)) })
	return list
}

// Check returns an error for what the kernel would refuse (map_write in
// kernel/user_namespace.c), and for a namespace without a root, in which no
// container can be made.
func (m Mapping) Check() error {
	if err := check("uid", m.UIDs); err != nil {
		return err
	}
	return check("gid", m.GIDs)
}

func check(kind string, list []specs.LinuxIDMapping) error {
	if len(list) == 0 {
		return fmt.Errorf("user namespaces enabled, but no %s mappings found", kind)
	}
	if len(list) > MaxExtents {
		return fmt.Errorf("%d %s mappings: at most %d", len(list), kind, MaxExtents)
	}
	root := false
	for i, e := range list {
		if e.Size == 0 || overflows(e.ContainerID, e.Size) || overflows(e.HostID, e.Size) {
			return fmt.Errorf("%s mapping %s: want ids from 0 to %d", kind, format(e), uint32(math.MaxUint32-1))
		}
		for _, o := range list[:i] {
			if overlap(e.ContainerID, e.Size, o.ContainerID, o.Size) || overlap(e.HostID, e.Size, o.HostID, o.Size) {
				return fmt.Errorf("%s mappings %s and %s overlap", kind, format(o), format(e))
			}
		}
		root = root || e.ContainerID == 0
	}
	if !root {
		return fmt.Errorf("container %s 0 is not mapped", kind)
	}
	return nil
}

// overflows reports whether the ids from first on are more than there are: the
// last 32-bit number is no id.
func overflows(first, size uint32) bool { return uint64(first)+uint64(size) > math.MaxUint32 }

func overlap(a, aSize, b, bSize uint32) bool {
	return uint64(a) < uint64(b)+uint64(bSize) && uint64(b) < uint64(a)+uint64(aSize)
}

// Root returns the outside ids of the namespace's root, which without a
// namespace is the host's: 0, 0.
func (m Mapping) Root() (uid, gid uint32) { return root(m.UIDs), root(m.GIDs) }

func root(list []specs.LinuxIDMapping) uint32 {
	for _, e := range list {
		if e.ContainerID == 0 {
			return e.HostID
		}
	}
	return 0
}

// Format returns the extents as "container:host:size", separated by commas.
func Format(list []specs.LinuxIDMapping) string {
	parts := make([]string, len(list))
	for i, e := range list {
		parts[i] = format(e)
	}
	return strings.Join(parts, ",")
}

func format(e specs.LinuxIDMapping) string {
	return fmt.Sprintf("%d:%d:%d", e.ContainerID, e.HostID, e.Size)
}

// Parse is the inverse of Format.
func Parse(s string) ([]specs.LinuxIDMapping, error) {
	var list []specs.LinuxIDMapping
	for _, part := range strings.Split(s, ",") {
		fields := strings.Split(part, ":")
		if len(fields) != 3 {
			return nil, fmt.Errorf("id mapping %q: want container:host:size", part)
		}
		var n [3]uint32
		for i, f := range fields {
			v, err := strconv.ParseUint(f, 10, 32)
			if err != nil {
				return nil, fmt.Errorf("id mapping %q: want container:host:size", part)
			}
			n[i] = uint32(v)
		}
		list = append(list, specs.LinuxIDMapping{ContainerID: n[0], HostID: n[1], Size: n[2]})
	}
	return list, nil
}
