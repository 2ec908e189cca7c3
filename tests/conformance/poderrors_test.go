package conformance

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/api/cri"
)

// refusalTime is how long a request that can only fail may take.
const refusalTime = 2 * time.Second

// refused wants request to fail soon, with a kind of error, and without a trace.
func (s *shim) refused(what string, is func(error) bool, request func() error) {
	s.t.Helper()
	before := s.traces()
	begin := time.Now()
	err := nativeError(request())
	if took := time.Since(begin); took > refusalTime {
		s.t.Errorf("%s is refused after %v; want within %v", what, took, refusalTime)
	}
	if err == nil || !is(err) {
		s.t.Errorf("%s = %v; want an error of another kind", what, err)
	}
	// What was there may be on its way out.
	left := slices.DeleteFunc(s.traces(), func(trace string) bool { return slices.Contains(before, trace) })
	if len(left) > 0 {
		s.t.Errorf("%s has left something:\n%s", what, strings.Join(left, "\n"))
	}
}

// traces lists what the shim has on the host: its folders and its processes.
func (s *shim) traces() []string {
	s.t.Helper()
	found, err := filepath.Glob(filepath.Join(s.dir, "state", "*", "*"))
	if err != nil {
		s.t.Fatal(err)
	}
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", s.pid()))
	if err != nil || len(lists) == 0 {
		s.t.Fatalf("list the shim's processes: %d threads, %v", len(lists), err)
	}
	for _, list := range lists {
		b, err := os.ReadFile(list)
		if err != nil {
			continue // the thread has ended, and its children have another parent
		}
		for _, pid := range strings.Fields(string(b)) {
			name, _ := os.ReadFile("/proc/" + pid + "/comm") // empty: it is ending
			found = append(found, "process "+pid+" "+strings.TrimSpace(string(name)))
		}
	}
	return found
}

// newNetNS makes a named network namespace and runs lines of ip(8)'s arguments
// in it.
func newNetNS(t *testing.T, lines ...string) (name, path string) {
	t.Helper()
	name = newID()
	run := func(line string) {
		t.Helper()
		if out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", line, err, out)
		}
	}
	run("netns add " + name)
	t.Cleanup(func() {
		if exists("/run/netns/" + name) {
			run("netns del " + name)
		}
	})
	for _, line := range lines {
		run("-n " + name + " " + line)
	}
	return name, "/run/netns/" + name
}

// vanished returns the path of a network namespace that was deleted.
func vanished(t *testing.T) string {
	t.Helper()
	name, path := newNetNS(t)
	if out, err := exec.Command("ip", "netns", "del", name).CombinedOutput(); err != nil {
		t.Fatalf("ip netns del: %v: %s", err, out)
	}
	return path
}

func inNetNS(path string) func(*specs.Spec) {
	return func(s *specs.Spec) {
		for i, n := range s.Linux.Namespaces {
			if n.Type == specs.NetworkNamespace {
				s.Linux.Namespaces[i].Path = path
			}
		}
	}
}

func annotate(key, value string) func(*specs.Spec) {
	return func(s *specs.Spec) { s.Annotations[key] = value }
}

// Bad input to a pod that comes as a container.
func TestPodErrors(t *testing.T) {
	const size = "io.kubernetes.cri.sandbox-"
	good := newPodsandbox(t, func(s *specs.Spec) {
		// None of that is an error: unknown annotations, and more than the host has.
		annotate("example.org/pod", "\x00\n{")(s)
		annotate("io.kubernetes.cri.unknown", "?")(s)
		annotate(size+"memory", "9223372036854775807")(s)
		annotate(size+"cpu-quota", "9223372036854775807")(s)
		annotate(size+"cpu-period", "1")(s)
	})
	s := newShim(t, options{})
	s.refused("Start without Create", errdefs.IsNotFound, start("").bind(s))
	for _, tt := range []struct {
		name   string
		change func(*specs.Spec)
		is     func(error) bool
	}{
		{"memory that is no number", annotate(size+"memory", "lots"), errdefs.IsInvalidArgument},
		{"empty memory", annotate(size+"memory", ""), errdefs.IsInvalidArgument},
		{"memory too large to be a number", annotate(size+"memory", "9223372036854775808"), errdefs.IsInvalidArgument},
		{"negative memory", annotate(size+"memory", "-5"), errdefs.IsInvalidArgument},
		{"CPU quota that is no number", annotate(size+"cpu-quota", "1e9"), errdefs.IsInvalidArgument},
		{"negative CPU period", annotate(size+"cpu-period", "-1"), errdefs.IsInvalidArgument},
		{"network namespace that vanished", inNetNS(vanished(t)), errdefs.IsFailedPrecondition},
		{"network namespace that is a file", inNetNS("/etc/passwd"), errdefs.IsFailedPrecondition},
		{"network namespace of another pod", inNetNS(fmt.Sprintf("/proc/%d/ns/net", good.pid)), errdefs.IsFailedPrecondition},
		{"user namespace without ids", func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		}, errdefs.IsInvalidArgument},
		{"sysctl of the host's network", func(s *specs.Spec) {
			s.Linux.Namespaces = without(s.Linux.Namespaces, specs.NetworkNamespace)
		}, errdefs.IsInvalidArgument},
	} {
		bad := s.add(t, options{spec: podSpec("/nonexistent", tt.change)})
		bad.refused("pod with "+tt.name, tt.is, create.bind(bad))
	}

	c := good.container(nil)
	c.launch()
	host := hostMiB(t)
	if got := c.out("awk '/MemTotal/ { print int($2/1024) }' /proc/meminfo"); got == "" || len(got) < len(fmt.Sprint(host))-1 {
		t.Errorf("memory of a pod without bounds = %s MiB; want much of the host's %d", got, host)
	}
	p := good.shim
	p.refused("second Create", errdefs.IsAlreadyExists, create.bind(p))
	p.refused("second Start", errdefs.IsFailedPrecondition, start("").bind(p))
	p.refused("Exec", errdefs.IsNotImplemented, addExec("e").bind(p))
	p.refused("Delete of a running pod", errdefs.IsFailedPrecondition, remove("").bind(p))
	c.kill(syscall.SIGKILL, false)
	c.wait("")
	// containerd that restarts would delete what answers with an empty list.
	c.refused("Pids of a container that has ended", errdefs.IsFailedPrecondition, pids.bind(c))
	c.delete("")
	p.kill(syscall.SIGTERM, false)
	if got := p.wait(""); got != 0 {
		t.Errorf("status of a pod that was stopped = %d; want 0", got)
	}
	p.refused("second Kill", errdefs.IsNotFound, kill("", syscall.SIGTERM, false).bind(p))
	late := good.container(nil)
	p.refused("container in a pod that has ended", errdefs.IsUnavailable, create.bind(late))
	p.delete("")
	p.refused("second Delete", errdefs.IsNotFound, remove("").bind(p))
	p.refused("container in a pod that was deleted", errdefs.IsUnavailable, create.bind(late))
}

// bind makes a request of a shim.
func (r request) bind(s *shim) func() error { return func() error { return r.call(s) } }

func hostMiB(t *testing.T) uint64 {
	t.Helper()
	var info syscall.Sysinfo_t
	if err := syscall.Sysinfo(&info); err != nil {
		t.Fatal(err)
	}
	return info.Totalram * uint64(info.Unit) >> 20
}

// Bad input to the Sandbox API.
func TestSandboxAPIErrors(t *testing.T) {
	s := newAPIShim(t)
	api := s.sandboxes()
	for what, request := range map[string]func() error{
		"StartSandbox": func() error {
			_, err := api.StartSandbox(s.call(), &sandboxapi.StartSandboxRequest{SandboxID: s.id})
			return err
		},
		"StopSandbox": func() error {
			_, err := api.StopSandbox(s.call(), &sandboxapi.StopSandboxRequest{SandboxID: s.id})
			return err
		},
		"SandboxStatus": func() error {
			_, err := api.SandboxStatus(s.call(), &sandboxapi.SandboxStatusRequest{SandboxID: s.id})
			return err
		},
		"WaitSandbox": func() error {
			_, err := api.WaitSandbox(s.call(), &sandboxapi.WaitSandboxRequest{SandboxID: s.id})
			return err
		},
		"SandboxMetrics": func() error {
			_, err := api.SandboxMetrics(s.call(), &sandboxapi.SandboxMetricsRequest{SandboxID: s.id})
			return err
		},
		"UpdateSandbox": func() error {
			_, err := api.UpdateSandbox(s.call(), &sandboxapi.UpdateSandboxRequest{SandboxID: s.id})
			return err
		},
	} {
		s.refused(what+" without Create", errdefs.IsNotFound, request)
	}
	create := func(change func(*cri.PodSandboxConfig), edit func(*sandboxapi.CreateSandboxRequest)) func() error {
		return func() error {
			r := &sandboxapi.CreateSandboxRequest{SandboxID: s.id, BundlePath: s.bundle, Options: criConfig(t, change)}
			if edit != nil {
				edit(r)
			}
			_, err := api.CreateSandbox(s.call(), r)
			return err
		}
	}
	resources := func(r *cri.LinuxContainerResources) func(*cri.PodSandboxConfig) {
		return func(c *cri.PodSandboxConfig) { c.Linux.Resources = r }
	}
	for _, tt := range []struct {
		name   string
		change func(*cri.PodSandboxConfig)
		edit   func(*sandboxapi.CreateSandboxRequest)
		is     func(error) bool
	}{
		{"sysctl of the host's network", func(c *cri.PodSandboxConfig) {
			c.Linux.Sysctls = map[string]string{"net.ipv4.ip_forward": "1"}
			c.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}}
		}, nil, errdefs.IsInvalidArgument},
		{"user namespace without ids", func(c *cri.PodSandboxConfig) {
			c.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{}}}
		}, nil, errdefs.IsInvalidArgument},
		{"negative memory", resources(&cri.LinuxContainerResources{MemoryLimitInBytes: -5}), nil, errdefs.IsInvalidArgument},
		{"negative CPU quota", resources(&cri.LinuxContainerResources{CpuQuota: -5, CpuPeriod: 100000}), nil, errdefs.IsInvalidArgument},
		{"negative CPU period", resources(&cri.LinuxContainerResources{CpuQuota: 5, CpuPeriod: -1}), nil, errdefs.IsInvalidArgument},
		{"negative overhead", func(c *cri.PodSandboxConfig) {
			c.Linux.Overhead = &cri.LinuxContainerResources{MemoryLimitInBytes: -5}
		}, nil, errdefs.IsInvalidArgument},
		{"network namespace that vanished", nil, func(r *sandboxapi.CreateSandboxRequest) { r.NetnsPath = vanished(t) }, errdefs.IsFailedPrecondition},
		{"network namespace that is a file", nil, func(r *sandboxapi.CreateSandboxRequest) { r.NetnsPath = "/etc/passwd" }, errdefs.IsFailedPrecondition},
		{"other options", nil, func(r *sandboxapi.CreateSandboxRequest) { r.Options.TypeUrl = "other" }, errdefs.IsInvalidArgument},
		{"malformed options", nil, func(r *sandboxapi.CreateSandboxRequest) { r.Options.Value = []byte{0xff} }, errdefs.IsInvalidArgument},
		{"bad id", nil, func(r *sandboxapi.CreateSandboxRequest) { r.SandboxID = "../x" }, errdefs.IsInvalidArgument},
	} {
		s.refused("CreateSandbox with "+tt.name, tt.is, create(tt.change, tt.edit))
	}
	// None of that has left anything: it can still be created.
	absurd := &cri.LinuxContainerResources{MemoryLimitInBytes: 1 << 60, CpuQuota: 1 << 50, CpuPeriod: 1000}
	if err := create(func(c *cri.PodSandboxConfig) { c.Linux.Resources, c.Linux.Overhead = absurd, absurd }, nil)(); err != nil {
		t.Fatalf("CreateSandbox with absurd limits = %v; want nil", err)
	}
	// Meanwhile the machine starts, and leaves traces.
	if err := nativeError(create(nil, nil)()); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second CreateSandbox = %v; want that it exists", err)
	}
	// Stopped while it boots.
	if _, err := api.StopSandbox(s.call(), &sandboxapi.StopSandboxRequest{SandboxID: s.id}); err != nil {
		t.Errorf("StopSandbox of a booting sandbox = %v; want nil", err)
	}
	s.refused("StartSandbox of a stopped sandbox", func(error) bool { return true }, func() error {
		_, err := api.StartSandbox(s.call(), &sandboxapi.StartSandboxRequest{SandboxID: s.id})
		return err
	})
}

// The statistics of the container that stands for a pod are the pod's.
func TestPodStats(t *testing.T) {
	p := newPodsandbox(t, nil)
	m := p.metrics()
	if cpu, memory := m.GetCPU().GetUsageUsec(), m.GetMemory().GetUsage(); cpu < 100_000 || memory < 30<<20 {
		t.Errorf("statistics of a pod = %d us of CPU time, %d bytes of memory; want those of a virtual machine", cpu, memory)
	}
	p.kill(syscall.SIGKILL, false)
	p.wait("")
	p.refused("statistics of a pod that has ended", errdefs.IsNotFound, stats.bind(p.shim))
}

// A pod whose network has no address has the interface all the same.
func TestPodWithoutAddress(t *testing.T) {
	netns := func(t *testing.T) string {
		far, _ := newNetNS(t)
		_, path := newNetNS(t, "link add eth0 address 02:00:00:00:00:09 type veth peer name far netns "+far, "link set eth0 up")
		return path
	}
	check := func(t *testing.T, p *pod) {
		c := p.container(nil)
		c.launch()
		defer c.discard()
		if got := c.out("cat /sys/class/net/eth0/address; ip -4 -o addr show dev eth0"); got != "02:00:00:00:00:09" {
			t.Errorf("eth0 = %q; want its hardware address and no other", got)
		}
	}
	t.Run("podsandbox", func(t *testing.T) { check(t, newPodsandbox(t, inNetNS(netns(t)))) })
	t.Run("sandbox-api", func(t *testing.T) { check(t, newAPIPodIn(t, netns(t), nil)) })
}

// A container whose network namespace is new gets one interface that comes
// between Create and Start, and no more than that.
func TestLateInterface(t *testing.T) {
	s := newShim(t, options{spec: sleeper})
	pid := s.mustCreate(nil, false)
	ip := func(line string) {
		t.Helper()
		args := append([]string{fmt.Sprintf("--net=/proc/%d/ns/net", pid), "ip"}, strings.Fields(line)...)
		if out, err := exec.Command("nsenter", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", line, err, out)
		}
	}
	far, _ := newNetNS(t)
	for i, name := range []string{"eth0", "eth1"} {
		ip(fmt.Sprintf("link add %s address 02:00:00:00:01:0%d type veth peer name far%d netns %s", name, i, i, far))
		ip(fmt.Sprintf("addr add 10.20.%d.2/24 dev %s", i, name))
		ip("link set " + name + " up")
	}
	_, err := s.task.Start(s.call(), &taskapi.StartRequest{ID: s.id})
	if err = nativeError(err); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "eth1") {
		t.Errorf("Start with two late interfaces = %v; want an exhausted resource and the second's name", err)
	}
	ip("link del eth1")
	s.mustStart("")
	if got := s.out("cat /sys/class/net/eth0/address; ip -4 -o addr show dev eth0"); !strings.Contains(got, "02:00:00:00:01:00") || !strings.Contains(got, "10.20.0.2/24") {
		t.Errorf("eth0 in the container = %q; want the late interface", got)
	}
}
