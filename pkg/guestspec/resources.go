package guestspec

import (
	"maps"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// RewriteResources does for an update's resources what Rewrite does for a
// spec's. The strings are warnings.
func RewriteResources(r *specs.LinuxResources) (*specs.LinuxResources, []string, error) {
	if r == nil {
		return nil, nil, invalid("resources must not be empty")
	}
	src, err := clone(r)
	if err != nil {
		return nil, nil, err
	}
	var rep report
	out, err := rewriteResources(src, &rep)
	return out, rep.warnings, err
}

// rewriteResources names every field that is kept. What cgroup v2 lacks is
// dropped, where crun fails for it and runc ignores it.
func rewriteResources(r *specs.LinuxResources, rep *report) (*specs.LinuxResources, error) {
	if r == nil {
		return nil, nil
	}
	if err := checkDeviceRules(r.Devices); err != nil {
		return nil, err
	}
	out := &specs.LinuxResources{
		Devices: r.Devices,
		Memory:  rewriteMemory(r.Memory, rep),
		CPU:     rewriteCPU(r.CPU, rep),
		Pids:    r.Pids,
	}
	var err error
	if out.Unified, err = rewriteUnified(r.Unified, rep); err != nil {
		return nil, err
	}
	if r.BlockIO != nil {
		rep.warn("blockIO is not applied: the virtual machine does not see the host's devices")
	}
	for _, h := range r.HugepageLimits {
		// CRI sets a limit of 0 for each size that the host has.
		if h.Limit > 0 {
			rep.warn("hugepageLimits: %s: the virtual machine has no huge pages to give", h.Pagesize)
		}
	}
	if len(r.Rdma) > 0 {
		rep.warn("rdma is not applied: the virtual machine does not see the host's devices")
	}
	if n := r.Network; n != nil && (n.ClassID != nil || len(n.Priorities) > 0) {
		rep.warn("network class and priorities are not applied: cgroup v2 has none")
	}
	return out, nil
}

// checkDeviceRules words errors as runc does.
func checkDeviceRules(rules []specs.LinuxDeviceCgroup) error {
	for i, d := range rules {
		if d.Access == "" {
			return invalid("device access at %d field cannot be empty", i)
		}
		if !slices.Contains([]string{"", "a", "b", "c"}, d.Type) {
			return invalid("invalid cgroup device type %q", d.Type)
		}
	}
	return nil
}

func rewriteMemory(m *specs.LinuxMemory, rep *report) *specs.LinuxMemory {
	if m == nil {
		return nil
	}
	//lint:ignore SA1019 deprecated, and still sent
	if m.Kernel != nil || m.KernelTCP != nil {
		rep.warn("kernel memory settings are ignored")
	}
	if m.Swappiness != nil {
		rep.warn("memory swappiness is not applied: cgroup v2 has none")
	}
	if m.DisableOOMKiller != nil && *m.DisableOOMKiller {
		rep.warn("disableOOMKiller is not applied: cgroup v2 has no such switch")
	}
	return &specs.LinuxMemory{
		Limit:             m.Limit,
		Reservation:       m.Reservation,
		Swap:              m.Swap,
		CheckBeforeUpdate: m.CheckBeforeUpdate,
	}
}

func rewriteCPU(c *specs.LinuxCPU, rep *report) *specs.LinuxCPU {
	if c == nil {
		return nil
	}
	if c.Cpus != "" || c.Mems != "" {
		rep.note("cpuset cpus %q, mems %q: the host's topology is not the virtual machine's", c.Cpus, c.Mems)
	}
	if c.RealtimeRuntime != nil || c.RealtimePeriod != nil {
		rep.warn("realtime CPU limits are not applied: cgroup v2 has none")
	}
	return &specs.LinuxCPU{Shares: c.Shares, Quota: c.Quota, Burst: c.Burst, Period: c.Period, Idle: c.Idle}
}

// rewriteUnified words errors as runc does.
func rewriteUnified(u map[string]string, rep *report) (map[string]string, error) {
	var out map[string]string
	for _, key := range slices.Sorted(maps.Keys(u)) {
		if strings.Contains(key, "/") {
			return nil, invalid("unified resource %q must be a file name (no slashes)", key)
		}
		controller, _, ok := strings.Cut(key, ".")
		if !ok {
			return nil, invalid("unified resource %q must be in the form CONTROLLER.PARAMETER", key)
		}
		if !slices.Contains([]string{"cgroup", "cpu", "memory", "pids"}, controller) {
			rep.warn("unified resource %s is not applied: it is about the host's devices or topology", key)
			continue
		}
		if out == nil {
			out = map[string]string{}
		}
		out[key] = u[key]
	}
	return out, nil
}
