package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Stats is what the host counts for the pod. What no hierarchy counts is zero.
type Stats struct {
	// CPUTotal is processor time; CPUUser and CPUSystem are its parts.
	CPUTotal, CPUUser, CPUSystem time.Duration
	// Memory is in use, page cache included; MemoryInactiveFile is the part of
	// it that the kernel can take back first; MemoryLimit is 0 without a limit.
	// Bytes.
	Memory, MemoryInactiveFile, MemoryLimit uint64
	// Pids counts threads.
	Pids uint64
}

// NoLimit is what cgroup v1 shows at least for no memory limit, in bytes.
const NoLimit = 1 << 62

// clockTicks are those of cpuacct.stat in a second: USER_HZ, which is 100 on
// all architectures that Go runs on.
const clockTicks = 100

// Stats reads the counters.
func (c *Cgroup) Stats() (Stats, error) {
	var s Stats
	for _, p := range c.places {
		r := reader{dir: p.dir}
		switch {
		case p.v2:
			r.unified(&s)
		default:
			if p.has("cpuacct") {
				r.cpuacct(&s)
			}
			if p.has("memory") {
				s.Memory = r.number("memory.usage_in_bytes")
				s.MemoryLimit = r.number("memory.limit_in_bytes")
				s.MemoryInactiveFile = r.keyed("memory.stat")["total_inactive_file"]
			}
			if p.has("pids") {
				s.Pids = r.number("pids.current")
			}
		}
		if r.err != nil {
			return Stats{}, fmt.Errorf("read statistics of cgroup %s: %w", c.path, r.err)
		}
	}
	if s.MemoryLimit >= NoLimit {
		s.MemoryLimit = 0
	}
	return s, nil
}

// ParentMemory returns the memory limit, in bytes, of the cgroup that the one
// named by cgroupsPath is in, as Create understands it; 0 for no limit, and where
// it cannot be told. For a pod of Kubernetes, whose cgroupsPath is that of its
// sandbox, the kubelet has made it before: it holds all of the pod.
func ParentMemory(cgroupsPath string) (uint64, error) {
	hs, err := hierarchies()
	if err != nil {
		return 0, err
	}
	return parentMemory(hs, cgroupsPath)
}

func parentMemory(hs []hierarchy, cgroupsPath string) (uint64, error) {
	p, err := resolve(cgroupsPath, "")
	if err != nil {
		return 0, err
	}
	for _, pl := range placesOf(hs, filepath.Dir(p)) {
		file := "memory.max"
		if !pl.v2 {
			if !pl.has("memory") {
				continue
			}
			file = "memory.limit_in_bytes"
		}
		r := reader{dir: pl.dir}
		limit := r.number(file)
		if r.err != nil {
			return 0, fmt.Errorf("read memory limit of cgroup %s: %w", filepath.Dir(p), r.err)
		}
		if limit > 0 && limit < NoLimit {
			return limit, nil
		}
	}
	return 0, nil
}

// reader reads control files. A file that is absent, since its controller is,
// reads as nothing; err is the first other error.
type reader struct {
	dir string
	err error
}

func (r *reader) unified(s *Stats) {
	cpu := r.keyed("cpu.stat")
	s.CPUTotal = time.Duration(cpu["usage_usec"]) * time.Microsecond
	s.CPUUser = time.Duration(cpu["user_usec"]) * time.Microsecond
	s.CPUSystem = time.Duration(cpu["system_usec"]) * time.Microsecond
	s.Memory = r.number("memory.current")
	s.MemoryLimit = r.number("memory.max")
	s.MemoryInactiveFile = r.keyed("memory.stat")["inactive_file"]
	s.Pids = r.number("pids.current")
}

func (r *reader) cpuacct(s *Stats) {
	if s.CPUTotal != 0 {
		return // cgroup v2 counts CPU time without a controller too.
	}
	s.CPUTotal = time.Duration(r.number("cpuacct.usage"))
	parts := r.keyed("cpuacct.stat")
	s.CPUUser = time.Duration(parts["user"]) * time.Second / clockTicks
	s.CPUSystem = time.Duration(parts["system"]) * time.Second / clockTicks
}

func (r *reader) read(name string) string {
	b, err := os.ReadFile(filepath.Join(r.dir, name))
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EOPNOTSUPP) && r.err == nil {
		r.err = err
	}
	return string(b)
}

// number reads a file of one number; "max" is 0.
func (r *reader) number(name string) uint64 {
	s := strings.TrimSpace(r.read(name))
	if s == "" || s == "max" {
		return 0
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil && r.err == nil {
		r.err = fmt.Errorf("%s: %w", name, err)
	}
	return n
}

// keyed reads a file of lines "key number"; others are left out.
func (r *reader) keyed(name string) map[string]uint64 {
	out := map[string]uint64{}
	for line := range strings.Lines(r.read(name)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.ParseUint(value, 10, 64); err == nil {
			out[key] = n
		}
	}
	return out
}
