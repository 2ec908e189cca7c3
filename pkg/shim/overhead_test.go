package shim

import (
	"bytes"
	"strings"
	"testing"

	"github.com/containerd/log"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/api/cri"
	"github.com/vmrt/vmrt/pkg/config"
	"github.com/vmrt/vmrt/pkg/hypervisor"
)

func TestLearnOverhead(t *testing.T) {
	logger := log.L.Logger
	before := logger.Out
	defer logger.SetOutput(before)
	var out bytes.Buffer
	logger.SetOutput(&out)

	host := machine{memoryMiB: 16384, cpus: 8}
	for _, tt := range []struct {
		name     string
		limit    int64 // MiB
		overhead int64 // MiB
		accel    hypervisor.Accelerator
		memory   int // MiB
		hostNet  bool
		warning  string // a part of it
	}{
		{"not known", 1024, 0, hypervisor.KVM, 1024 + 64 + 16, false, ""},
		{"as much as is needed", 1024, 64 + 16 + 40 + 4, hypervisor.KVM, 1024 + 64 + 16, false, ""},
		{"of the RuntimeClass in deploy", 1200, 128, hypervisor.KVM, 1200 + 128 - 44, false, ""},
		{"a MiB less", 1024, 64 + 16 + 40 + 4 - 1, hypervisor.KVM, 1024 + 64 + 16, false, "overhead of 123 MiB is too small"},
		{"emulated, it is not enough", 1024, 64 + 16 + 40 + 4, hypervisor.TCG, 1024 + 64 + 16, false, "an overhead of 196 MiB is enough"},
		{"emulated, as much as is needed", 1024, 64 + 16 + 112 + 4, hypervisor.TCG, 1024 + 64 + 16, false, ""},
		{"with the host's network, it is not enough", 1024, 64 + 16 + 40 + 4, hypervisor.KVM, 1024 + 64 + 16, true, "an overhead of 188 MiB is enough"},
		{"next to nothing", 1024, 1, hypervisor.KVM, 1024 + 64 + 16, false, "overhead of 1 MiB"},
		{"much", 1024, 1024 + 44, hypervisor.KVM, 2048, false, ""},
		{"more than the host has", 1024, 1 << 40, hypervisor.KVM, 16384, false, ""},
		{"as much as there are numbers", 1024, 1<<43 - 1, hypervisor.KVM, 16384, false, ""},
		{"of a pod without a limit", 0, 1024, hypervisor.KVM, 256, false, ""},
		{"of a pod smaller than the default", 16, 128, hypervisor.KVM, 256, false, ""},
		{"of a pod smaller than the default, much", 16, 512, hypervisor.KVM, 16 + 472, false, ""},
	} {
		out.Reset()
		p := &podConfig{
			name: "web/front", open: &api.OpenPodRequest{}, hostNetwork: tt.hostNet,
			limits: limits{memory: tt.limit << 20, overhead: tt.overhead << 20},
		}
		settings := &config.Config{MemoryMiB: 256, CPUs: 1, Accelerator: tt.accel}
		p.learnOverhead(settings)
		memory, cpus, err := host.size(p.limits, settings)
		if err != nil || memory != tt.memory || cpus != 1 {
			t.Errorf("overhead %s: size = %d MiB, %d CPUs, %v; want %d MiB, 1 CPU", tt.name, memory, cpus, err, tt.memory)
		}
		if got := out.String(); (got == "") != (tt.warning == "") || !strings.Contains(got, tt.warning) || got != "" && !strings.Contains(got, "web/front") {
			t.Errorf("overhead %s: logged %q; want %q, with the pod's name", tt.name, got, tt.warning)
		}
	}
}

// The CPUs of an overhead are not the containers'.
func TestCRILimits(t *testing.T) {
	got := criLimits(&cri.LinuxPodSandboxConfig{
		Resources: &cri.LinuxContainerResources{MemoryLimitInBytes: 1024, CpuQuota: 100000, CpuPeriod: 100000},
		Overhead:  &cri.LinuxContainerResources{MemoryLimitInBytes: 512, CpuQuota: 25000, CpuPeriod: 100000},
	})
	if want := (limits{memory: 1024, cpuQuota: 100000, period: 100000, overhead: 512}); got != want {
		t.Errorf("criLimits = %+v; want %+v", got, want)
	}
	if got := criLimits(nil); got != (limits{}) {
		t.Errorf("criLimits(nil) = %+v; want nothing", got)
	}
}

func TestUpdatedSize(t *testing.T) {
	overhead := &updatedSize{Memory: 128 << 20, CPUQuota: 25000, CPUPeriod: 100000}
	for _, tt := range []struct {
		name     string
		size     updatedSize
		overhead *updatedSize
		want     limits
	}{
		{"limits", updatedSize{100000, 200000, 1 << 30}, overhead, limits{period: 100000, cpuQuota: 200000, memory: 1 << 30}},
		{"no limits", updatedSize{100000, -1, -1}, nil, limits{period: 100000, cpuQuota: -1, memory: -1}},
		{"no limits, less the overhead", updatedSize{100000, -25001, -1 - 128<<20}, overhead, limits{period: 100000, cpuQuota: -1, memory: -1}},
		{"no limit of cgroup v1, less the overhead", updatedSize{Memory: 9223372036854771712 - 128<<20}, overhead, limits{memory: -1}},
		{"negative", updatedSize{100000, -25000, -128 << 20}, overhead, limits{period: 100000, cpuQuota: -25000, memory: -128 << 20}},
	} {
		if got := tt.size.limits(tt.overhead); got != tt.want {
			t.Errorf("%s: limits(%+v) = %+v; want %+v", tt.name, tt.size, got, tt.want)
		}
	}
}
