package cgroup

import (
	"bufio"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// hierarchy is one mounted cgroup hierarchy.
type hierarchy struct {
	// root is the mount point.
	root string
	// v2 is the unified hierarchy, of which there is at most one.
	v2 bool
	// controllers are those of a v1 hierarchy; name=systemd is one.
	controllers []string
}

// v1Controllers are those that a pod's processes are put into, as runc does.
// Other named hierarchies are somebody else's.
var v1Controllers = []string{
	"blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "misc", "name=systemd",
	"net_cls", "net_prio", "perf_event", "pids", "rdma",
}

// hierarchies lists what is mounted in this thread's mount namespace, cgroup
// v2 first.
func hierarchies() ([]hierarchy, error) {
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("find cgroup hierarchies: %w", err)
	}
	defer f.Close()
	var all []hierarchy
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		h, ok := parseMount(lines.Text())
		if ok && h.reachable() && !slices.ContainsFunc(all, h.same) {
			all = append(all, h)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("find cgroup hierarchies: %w", err)
	}
	slices.SortStableFunc(all, func(a, b hierarchy) int {
		switch {
		case a.v2 && !b.v2:
			return -1
		case b.v2 && !a.v2:
			return 1
		}
		return strings.Compare(a.root, b.root)
	})
	return all, nil
}

// parseMount reads a line of /proc/<pid>/mountinfo (proc_pid_mountinfo(5)).
func parseMount(line string) (hierarchy, bool) {
	mount, super, ok := strings.Cut(line, " - ")
	mountFields, superFields := strings.Fields(mount), strings.Fields(super)
	if !ok || len(mountFields) < 6 || len(superFields) < 3 {
		return hierarchy{}, false
	}
	// Other places than this are views for other purposes, such as a container's.
	h := hierarchy{root: mountFields[4]}
	if h.root != "/sys/fs/cgroup" && !strings.HasPrefix(h.root, "/sys/fs/cgroup/") {
		return h, false
	}
	switch superFields[0] {
	case "cgroup2":
		h.v2 = true
		return h, true
	case "cgroup":
		for opt := range strings.SplitSeq(superFields[2], ",") {
			if slices.Contains(v1Controllers, opt) {
				h.controllers = append(h.controllers, opt)
			}
		}
		return h, len(h.controllers) > 0
	}
	return h, false
}

// same reports whether o is another mount of the hierarchy.
func (h hierarchy) same(o hierarchy) bool {
	return h.v2 == o.v2 && slices.Equal(h.controllers, o.controllers)
}

// reachable reports whether the hierarchy is what its mount point shows:
// another mount may cover it.
func (h hierarchy) reachable() bool {
	var st unix.Statfs_t
	if err := unix.Statfs(h.root, &st); err != nil {
		return false
	}
	if h.v2 {
		return st.Type == unix.CGROUP2_SUPER_MAGIC
	}
	return st.Type == unix.CGROUP_SUPER_MAGIC
}

// String names the hierarchy in messages.
func (h hierarchy) String() string {
	if h.v2 {
		return "cgroup v2"
	}
	return "cgroup v1 " + strings.Join(h.controllers, ",")
}

func (h hierarchy) has(controller string) bool { return slices.Contains(h.controllers, controller) }
