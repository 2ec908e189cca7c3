package env

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"syscall"
)

// hierarchy is one mounted cgroup hierarchy of the machine.
type hierarchy struct {
	mount   string // mount point
	v2      bool
	options string // mount options that select a v1 hierarchy
}

// cgroups are an environment's own group in each hierarchy of the machine.
// The group is the root of the environment's cgroup namespace.
type cgroups struct {
	name        string
	hierarchies []hierarchy
}

// v2Init holds the environment's first processes under v2, where a group with
// processes cannot hand out controllers.
const v2Init = "init"

func newCgroups(name string) (_ *cgroups, err error) {
	hs, err := hierarchies()
	if err != nil {
		return nil, err
	}
	c := &cgroups{name: name, hierarchies: hs}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.remove())
		}
	}()
	for _, h := range hs {
		dir := c.dir(h)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, err
		}
		if h.v2 {
			if err := os.Mkdir(filepath.Join(dir, v2Init), 0o755); err != nil {
				return nil, err
			}
		}
		if strings.Contains(h.options, "cpuset") {
			if err := inheritCpuset(h.mount, dir); err != nil {
				return nil, err
			}
		}
	}
	return c, nil
}

func (c *cgroups) dir(h hierarchy) string { return filepath.Join(h.mount, c.name) }

// enter moves a process into the environment's groups.
func (c *cgroups) enter(pid int) error {
	for _, h := range c.hierarchies {
		if err := write(filepath.Join(c.dir(h), "cgroup.procs"), strconv.Itoa(pid)); err != nil {
			return err
		}
	}
	return nil
}

// delegate hands the v2 controllers that the machine's root offers to the
// environment's children. Processes left in the group's own folder would
// forbid it; mountScript has moved them away by then.
func (c *cgroups) delegate() error {
	for _, h := range c.hierarchies {
		if !h.v2 {
			continue
		}
		for _, dir := range []string{h.mount, c.dir(h)} {
			b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
			if err != nil {
				return err
			}
			for _, controller := range strings.Fields(string(b)) {
				if err := write(filepath.Join(dir, "cgroup.subtree_control"), "+"+controller); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// mountScript mounts the hierarchies at their places again. Done inside the
// cgroup namespace, each shows the environment's group as its root.
func (c *cgroups) mountScript() string {
	var s strings.Builder
	for i, h := range c.hierarchies {
		// The first mount point, sorted, may be the tmpfs over the others.
		if i == 0 && h.mount != "/sys/fs/cgroup" {
			s.WriteString("mount -t tmpfs -o mode=755 cgroup /sys/fs/cgroup\n")
		}
		fmt.Fprintf(&s, "mkdir -p %s\n", h.mount)
		if h.v2 {
			fmt.Fprintf(&s, "mount -t cgroup2 cgroup2 %[1]s\necho $$ >%[1]s/%[2]s/cgroup.procs\n", h.mount, v2Init)
		} else {
			fmt.Fprintf(&s, "mount -t cgroup -o %s cgroup %s\n", h.options, h.mount)
		}
	}
	return s.String()
}

// list returns the groups that exist below the environment's own, as
// mountpoint:path.
func (c *cgroups) list() ([]string, error) {
	var found []string
	for _, h := range c.hierarchies {
		root := c.dir(h)
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) { // removed while we look
				return nil
			}
			if err != nil || !d.IsDir() {
				return err
			}
			if rel, _ := filepath.Rel(root, path); rel != "." && !(h.v2 && rel == v2Init) {
				found = append(found, h.mount+":/"+rel)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return found, nil
}

// remove deletes the environment's groups, whose processes have ended.
func (c *cgroups) remove() error {
	var errs []error
	for _, h := range c.hierarchies {
		var dirs []string
		_ = filepath.WalkDir(c.dir(h), func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil // what cannot be read cannot be removed either, and is reported below
		})
		for i := len(dirs) - 1; i >= 0; i-- { // children first
			if err := os.Remove(dirs[i]); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// hierarchies reads which cgroup hierarchies are mounted below /sys/fs/cgroup
// (format: proc_pid_mountinfo(5)), sorted by mount point.
func hierarchies() ([]hierarchy, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var hs []hierarchy
	for sc := bufio.NewScanner(f); sc.Scan(); {
		before, after, ok := strings.Cut(sc.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 5 || len(right) < 3 || !strings.HasPrefix(left[4], "/sys/fs/cgroup") {
			continue
		}
		switch right[0] {
		case "cgroup2":
			hs = append(hs, hierarchy{mount: left[4], v2: true})
		case "cgroup":
			hs = append(hs, hierarchy{mount: left[4], options: v1Options(right[2])})
		}
	}
	if len(hs) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted below /sys/fs/cgroup")
	}
	sort.Slice(hs, func(i, j int) bool { return hs[i].mount < hs[j].mount })
	return hs, nil
}

// v1Options picks the options that name a v1 hierarchy out of its super block
// options.
func v1Options(super string) string {
	var keep []string
	for _, o := range strings.Split(super, ",") {
		switch {
		case strings.HasPrefix(o, "name="):
			keep = append(keep, "none", o)
		case o != "rw" && o != "ro" && !strings.Contains(o, "=") && o != "xattr" && o != "clone_children" && o != "noprefix":
			keep = append(keep, o)
		}
	}
	return strings.Join(keep, ",")
}

// inheritCpuset fills in what a new v1 cpuset group lacks and no process may
// enter without.
func inheritCpuset(parent, dir string) error {
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		b, err := os.ReadFile(filepath.Join(parent, name))
		if err != nil {
			return err
		}
		if err := write(filepath.Join(dir, name), strings.TrimSpace(string(b))); err != nil {
			return err
		}
	}
	return nil
}

// write writes to a control file, which must exist.
func write(path, s string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(s)
	return errors.Join(err, f.Close())
}
