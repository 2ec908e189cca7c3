package shim

import (
	"fmt"
	"runtime"
	"strconv"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api/cri"
	"github.com/vmrt/vmrt/pkg/config"
	"github.com/vmrt/vmrt/pkg/hypervisor"
)

// The annotations by which CRI says what a pod may use, when the pod comes as a
// container (containerd's podsandbox mode). Strings of decimal numbers.
const (
	annotationCPUPeriod = "io.kubernetes.cri.sandbox-cpu-period"
	annotationCPUQuota  = "io.kubernetes.cri.sandbox-cpu-quota"
	annotationMemory    = "io.kubernetes.cri.sandbox-memory"
)

// limits are what a pod's containers may use of the host. 0 or -1 is no limit.
type limits struct {
	memory           int64 // bytes
	cpuQuota, period int64 // microseconds
	// overhead is what the pod may use on the host beyond memory, in bytes; 0 or
	// -1 when nobody says.
	overhead int64
	// shareMiB is what the overhead leaves for the guest's kernel and agent.
	shareMiB int64
}

// machine is what a virtual machine must not exceed.
type machine struct {
	memoryMiB, cpus int
}

func thisMachine() (machine, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return machine{}, fmt.Errorf("read the host's memory size: %w", err)
	}
	return machine{
		memoryMiB: int(uint64(info.Totalram) * uint64(info.Unit) >> 20),
		cpus:      runtime.NumCPU(),
	}, nil
}

// size returns the memory in MiB and the number of CPUs of a virtual machine:
// the configuration's, more memory where the limit and the overhead ask for it,
// and as many CPUs as the limit can use. What the host does not have, or a guest
// cannot have, is not given.
func (m machine) size(l limits, settings *config.Config) (memoryMiB, cpus int, err error) {
	memoryMiB, cpus = settings.MemoryMiB, settings.CPUs
	switch {
	case l.memory < -1:
		return 0, 0, fmt.Errorf("memory limit of %d bytes: %w", l.memory, errdefs.ErrInvalidArgument)
	case l.overhead < -1:
		return 0, 0, fmt.Errorf("memory overhead of %d bytes: %w", l.overhead, errdefs.ErrInvalidArgument)
	case l.cpuQuota < -1:
		return 0, 0, fmt.Errorf("CPU quota of %d µs: %w", l.cpuQuota, errdefs.ErrInvalidArgument)
	case l.period < 0:
		return 0, 0, fmt.Errorf("CPU period of %d µs: %w", l.period, errdefs.ErrInvalidArgument)
	}
	if l.memory > 0 {
		wanted := l.memoryMiB() + max(l.shareMiB, guestMiB(l.memoryMiB()))
		memoryMiB = max(memoryMiB, int(min(wanted, int64(m.memoryMiB))))
	}
	if l.cpuQuota > 0 && l.period > 0 {
		wanted := (l.cpuQuota-1)/l.period + 1
		cpus = max(cpus, int(min(wanted, int64(m.cpus), hypervisor.MaxCPUs)))
	}
	return memoryMiB, cpus, nil
}

// memoryMiB is the memory limit in MiB.
func (l limits) memoryMiB() int64 { return (l.memory-1)>>20 + 1 }

// specLimits returns the limits of a container that has a virtual machine of
// its own.
func specLimits(r *specs.LinuxResources) (l limits) {
	if r == nil {
		return l
	}
	if m := r.Memory; m != nil && m.Limit != nil {
		l.memory = *m.Limit
	}
	if c := r.CPU; c != nil && c.Quota != nil && c.Period != nil {
		l.cpuQuota, l.period = *c.Quota, int64(min(*c.Period, 1<<62))
	}
	return l
}

// annotatedLimits returns the limits that a pod's annotations say.
func annotatedLimits(annotations map[string]string) (l limits, err error) {
	for _, a := range []struct {
		key   string
		value *int64
	}{{annotationMemory, &l.memory}, {annotationCPUQuota, &l.cpuQuota}, {annotationCPUPeriod, &l.period}} {
		text, ok := annotations[a.key]
		if !ok {
			continue
		}
		if *a.value, err = strconv.ParseInt(text, 10, 64); err != nil {
			return limits{}, fmt.Errorf("annotation %s = %q: want a whole number: %w", a.key, text, errdefs.ErrInvalidArgument)
		}
	}
	return l, nil
}

// criLimits returns the limits in a pod's configuration. The CPUs of its overhead
// are for the processes on the host, and make the virtual machine no larger.
func criLimits(linux *cri.LinuxPodSandboxConfig) limits {
	r := linux.GetResources()
	return limits{
		memory: r.GetMemoryLimitInBytes(), cpuQuota: r.GetCpuQuota(), period: r.GetCpuPeriod(),
		overhead: linux.GetOverhead().GetMemoryLimitInBytes(),
	}
}
