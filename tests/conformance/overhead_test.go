package conformance

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmrt/vmrt/api/cri"
	"github.com/vmrt/vmrt/pkg/cgroup"
	"github.com/vmrt/vmrt/pkg/hypervisor"
)

// servedMiB is what the shim counts for the processes on the host that serve a
// guest of so many MiB.
func servedMiB(t testing.TB, guestMiB int) int {
	t.Helper()
	accelerator, err := measured()
	if err != nil {
		t.Fatal(err)
	}
	if accelerator == hypervisor.TCG {
		return 112 + guestMiB/256
	}
	return 40 + guestMiB/256
}

// podCgroup makes the cgroup in which the kubelet would keep a pod, with a memory
// limit, and returns its path and the folder with its memory controller.
func podCgroup(t *testing.T, limit int) (path, dir string) {
	t.Helper()
	path = "/vmrt-conformance-pod-" + newID()
	c, err := cgroup.Create(path, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Remove(context.Background()); err != nil {
			t.Errorf("remove the pod's cgroup: %v", err)
		}
	})
	for _, file := range []string{
		filepath.Join("/sys/fs/cgroup", path, "memory.max"),
		filepath.Join("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes"),
	} {
		if exists(file) {
			if err := os.WriteFile(file, []byte(strconv.Itoa(limit)), 0); err != nil {
				t.Fatal(err)
			}
			return path, filepath.Dir(file)
		}
	}
	t.Skip("no cgroup hierarchy has a memory controller")
	return "", ""
}

// In both modes a pod's overhead makes its virtual machine larger, by what the
// processes on the host do not need. Where it is enough, the pod fits into its
// cgroup when its container uses all that it may; where it is too small, a warning
// says so.
func TestOverhead(t *testing.T) {
	const limit = 300
	inCgroup := func(t *testing.T, overhead int) *pod {
		path, _ := podCgroup(t, (limit+overhead)*mib)
		return newPodsandbox(t, func(spec *specs.Spec) {
			spec.Linux.CgroupsPath = path + "/sandbox"
			for k, v := range map[string]string{
				"sandbox-name": "front", "sandbox-namespace": "web", "sandbox-memory": strconv.Itoa(limit * mib),
				"sandbox-cpu-quota": "100000", "sandbox-cpu-period": "100000",
			} {
				spec.Annotations["io.kubernetes.cri."+k] = v
			}
		})
	}
	inConfig := func(t *testing.T, overhead int) *pod {
		return newAPIPod(t, func(c *cri.PodSandboxConfig) {
			c.Metadata = &cri.PodSandboxMetadata{Name: "front", Namespace: "web", Uid: "1"}
			c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: limit * mib, CpuQuota: 100000, CpuPeriod: 100000}
			c.Linux.Overhead = &cri.LinuxContainerResources{MemoryLimitInBytes: int64(overhead) * mib, CpuQuota: 25000, CpuPeriod: 100000}
		})
	}
	const least = limit + 64 + limit/64
	requireVM(t)
	enough := 64 + limit/64 + servedMiB(t, limit)
	warning := fmt.Sprintf("an overhead of %d MiB is enough", enough)
	for _, tt := range []struct {
		name             string
		newPod           func(*testing.T, int) *pod
		overhead, memory int
		warns            bool
		check            func(c *shim, p *pod, overhead int)
	}{
		{"podsandbox/more than enough", inCgroup, enough + 200, least + 200, false, nil},
		{"podsandbox/enough", inCgroup, enough, least, false, func(c *shim, p *pod, _ int) {
			c.wantShell("all", fmt.Sprintf("dd if=/dev/zero of=/dev/null bs=%dM count=1 2>/dev/null && echo fits", limit-10), "fits\n")
		}},
		{"sandbox-api/more than enough", inConfig, enough + 200, least + 200, false, resizes(limit)},
		{"sandbox-api/too small", inConfig, enough - 20, least, true, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := tt.newPod(t, tt.overhead)
			c := p.container(func(spec *specs.Spec) {
				spec.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: new(int64(limit * mib))}}
			})
			c.launch()
			defer c.discard()
			c.wantMemory(tt.memory)
			if got := c.out("nproc"); got != "1" {
				t.Errorf("nproc = %s; want 1, of the limit alone", got)
			}
			log := p.log.String()
			if strings.Contains(log, warning) != tt.warns || strings.Contains(log, "web/front") != tt.warns {
				t.Errorf("log warns of the overhead: %t; want %t:\n%s", !tt.warns, tt.warns, log)
			}
			if tt.check != nil {
				tt.check(c, p, tt.overhead)
			}
		})
	}
}

// wantMemory has a guest of a virtual machine of so many MiB, of which its kernel
// keeps a part.
func (s *shim) wantMemory(want int) {
	s.t.Helper()
	got, err := strconv.Atoi(s.out("awk '/MemTotal/ { print int($2/1024) }' /proc/meminfo"))
	if err != nil || got > want || got < want-50 {
		s.t.Errorf("guest has %d MiB, %v; want a little less than %d", got, err, want)
	}
}

// resizes has a pod with a limit and an overhead, in MiB, keep its memory.
func resizes(limit int) func(c *shim, p *pod, overhead int) {
	none := func(err error) bool { return err == nil }
	return func(c *shim, p *pod, overhead int) {
		for memory, is := range map[int]func(error) bool{
			limit * mib:       none,
			limit * mib / 2:   none,
			(limit + 1) * mib: errdefs.IsFailedPrecondition,
			// What the kubelet says of no limit.
			-1 - overhead*mib: none,
			-overhead * mib:   errdefs.IsInvalidArgument,
		} {
			ext := fmt.Sprintf(`{"Overhead":{"memory_limit_in_bytes":%d,"cpu_quota":25000,"cpu_period":100000},`+
				`"Resources":{"memory_limit_in_bytes":%d,"cpu_quota":-25001,"cpu_period":100000}}`, overhead*mib, memory)
			_, err := p.sandboxes().UpdateSandbox(p.call(), &sandboxapi.UpdateSandboxRequest{
				SandboxID: p.id, Fields: []string{"extensions"},
				Sandbox: &types.Sandbox{Extensions: map[string]*anypb.Any{
					"updated-resources": {TypeUrl: "io.containerd.cri.v1/UpdatedResources", Value: []byte(ext)},
				}},
			})
			if !is(nativeError(err)) {
				c.t.Errorf("UpdateSandbox with %s = %v; want another kind", ext, err)
			}
		}
	}
}

// TestHostMemory measures what the shim counts for the processes on the host that
// serve a pod, which are busy.
func TestHostMemory(t *testing.T) {
	const memory = 1024
	path, dir := podCgroup(t, 4*memory*mib)
	s := newShim(t, options{config: fmt.Sprintf("memory_mib = %d", memory), spec: func(spec *specs.Spec) {
		spec.Process.Args = []string{"sleep", "1000"}
		spec.Linux.CgroupsPath = path + "/sandbox"
	}})
	s.mustCreate(nil, false)
	s.mustStart("")
	most := 0
	look := func(when string) {
		anonymous, kernel := s.hostMemory(filepath.Join(dir, "sandbox"))
		t.Logf("%s: %d KiB of processes, %d KiB of the kernel", when, anonymous, kernel)
		most = max(most, anonymous+kernel)
	}
	look("idle")
	var ids []string
	for i := range 8 {
		id := fmt.Sprintf("e%d", i)
		ids = append(ids, id)
		s.mustExec(id, nil, false, "sh", "-c", fmt.Sprintf(
			"mkdir /w%[1]d; i=0; while [ $i -lt 100 ]; do echo $i >/w%[1]d/$i; i=$((i+1)); done; dd if=/dev/zero of=/w%[1]d/big bs=1M count=8; cat /w%[1]d/* >/dev/null", i))
	}
	for range 10 {
		time.Sleep(200 * time.Millisecond)
		look("busy")
	}
	for _, id := range ids {
		if status := s.wait(id); status != 0 {
			t.Errorf("status of %s = %d; want 0", id, status)
		}
	}
	look("after")
	if want := servedMiB(t, memory); most>>10 > want {
		t.Errorf("a busy pod takes %d MiB of the host beside its guest's memory; want at most %d", most>>10, want)
	}
}

// hostMemory returns in KiB what the shim and the processes in the pod's cgroup
// have of their own, which is not the guest's memory and no file, and what the
// kernel has for those in the cgroup.
func (s *shim) hostMemory(cgroup string) (anonymous, kernel int) {
	s.t.Helper()
	c, err := s.task.Connect(s.call(), &taskapi.ConnectRequest{ID: s.id})
	if err != nil {
		s.t.Fatal(err)
	}
	procs, err := os.ReadFile(filepath.Join(cgroup, "cgroup.procs"))
	if err != nil {
		s.t.Fatal(err)
	}
	for _, pid := range append(strings.Fields(string(procs)), fmt.Sprint(c.ShimPid)) {
		// That of a process that has just ended reads as nothing.
		rollup, _ := os.ReadFile(filepath.Join("/proc", pid, "smaps_rollup"))
		anonymous += field(string(rollup), "Anonymous:")
	}
	stat, err := os.ReadFile(filepath.Join(cgroup, "memory.stat"))
	if err != nil {
		s.t.Fatal(err)
	}
	kernel = field(string(stat), "kernel") / 1024
	if usage, err := os.ReadFile(filepath.Join(cgroup, "memory.kmem.usage_in_bytes")); err == nil { // cgroup v1
		kernel = field("kernel "+string(usage), "kernel") / 1024
	}
	return anonymous, kernel
}

// field returns the number that follows a name in lines of both; 0 if there is
// none.
func field(lines, name string) int {
	for line := range strings.Lines(lines) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == name {
			n, _ := strconv.Atoi(f[1])
			return n
		}
	}
	return 0
}
