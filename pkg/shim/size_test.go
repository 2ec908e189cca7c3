package shim

import (
	"testing"

	"github.com/containerd/errdefs"

	"github.com/vmrt/vmrt/pkg/config"
	"github.com/vmrt/vmrt/pkg/hypervisor"
)

func TestSize(t *testing.T) {
	host := machine{memoryMiB: 16384, cpus: 8}
	settings := &config.Config{MemoryMiB: 256, CPUs: 1}
	for _, tt := range []struct {
		name   string
		limits limits
		memory int
		cpus   int
	}{
		{"none", limits{}, 256, 1},
		{"none, as CRI says it", limits{memory: -1, cpuQuota: -1, period: 100000}, 256, 1},
		{"below the default", limits{memory: 64 << 20}, 256, 1},
		{"above the default", limits{memory: 1 << 30}, 1024 + 64 + 16, 1},
		{"a byte more", limits{memory: 1<<30 + 1}, 1025 + 64 + 16, 1},
		{"more than the host has", limits{memory: 1 << 60, cpuQuota: 1 << 60, period: 1}, 16384, 8},
		{"what an overhead leaves, too little", limits{memory: 1 << 30, shareMiB: -1 << 43}, 1024 + 64 + 16, 1},
		{"what an overhead leaves, without a limit", limits{shareMiB: 1024}, 256, 1},
		{"half a CPU", limits{cpuQuota: 50000, period: 100000}, 256, 1},
		{"two and a half CPUs", limits{cpuQuota: 250000, period: 100000}, 256, 3},
		{"a quota without a period", limits{cpuQuota: 250000}, 256, 1},
	} {
		memory, cpus, err := host.size(tt.limits, settings)
		if err != nil || memory != tt.memory || cpus != tt.cpus {
			t.Errorf("%s: size(%+v) = %d, %d, %v; want %d, %d", tt.name, tt.limits, memory, cpus, err, tt.memory, tt.cpus)
		}
	}
	large := machine{memoryMiB: 16384, cpus: 256}
	if _, cpus, err := large.size(limits{cpuQuota: 1 << 60, period: 1}, settings); err != nil || cpus != hypervisor.MaxCPUs {
		t.Errorf("size() on a host with 256 CPUs = %d CPUs, %v; want the %d that a guest can have", cpus, err, hypervisor.MaxCPUs)
	}
	for _, l := range []limits{{memory: -2}, {cpuQuota: -2}, {period: -1}, {memory: 1 << 30, overhead: -2}} {
		if _, _, err := host.size(l, settings); !errdefs.IsInvalidArgument(err) {
			t.Errorf("size(%+v) = %v; want an invalid argument", l, err)
		}
	}
}

func TestAnnotatedLimits(t *testing.T) {
	l, err := annotatedLimits(map[string]string{
		annotationMemory: "1024", annotationCPUQuota: "-1", annotationCPUPeriod: "100000", "io.kubernetes.cri.sandbox-cpu-shares": "x",
	})
	if want := (limits{memory: 1024, cpuQuota: -1, period: 100000}); err != nil || l != want {
		t.Errorf("annotatedLimits = %+v, %v; want %+v", l, err, want)
	}
	for _, bad := range []string{"", "1g", "9223372036854775808", "1.5", " 1"} {
		if _, err := annotatedLimits(map[string]string{annotationMemory: bad}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("annotatedLimits(%q) = %v; want an invalid argument", bad, err)
		}
	}
}
