package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	eventsapi "github.com/containerd/containerd/api/events"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmrt/vmrt/api/cri"
)

// pod is a pod made in one of containerd's two ways, without containerd.
type pod struct {
	*shim
	// pid is by which the pod's namespaces are named.
	pid uint32
	// shm is the host path of the pod's /dev/shm; empty in the Sandbox API.
	shm string
}

// podModes runs a test in both of containerd's sandbox modes.
func podModes(t *testing.T, f func(t *testing.T, p *pod)) {
	t.Run("podsandbox", func(t *testing.T) { f(t, newPodsandbox(t, nil)) })
	t.Run("sandbox-api", func(t *testing.T) { f(t, newAPIPod(t, nil)) })
}

// newPodsandbox makes a pod by a container, as containerd's CRI does.
func newPodsandbox(t *testing.T, change func(*specs.Spec)) *pod {
	t.Helper()
	shm := t.TempDir()
	if err := syscall.Mount("shm", shm, "tmpfs", 0, "mode=1777,size=32m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(shm, 0); err != nil {
			t.Errorf("unmount the pod's shm: %v", err)
		}
	})
	s := newShim(t, options{spec: podSpec(shm, change)})
	p := &pod{shim: s, pid: s.mustCreate(nil, false), shm: shm}
	s.mustStart("")
	return p
}

// podSpec makes a spec what CRI writes for a pod, whose /dev/shm is at shm on
// the host, and then changes it.
func podSpec(shm string, change func(*specs.Spec)) func(*specs.Spec) {
	return func(spec *specs.Spec) {
		spec.Process.Args = []string{"/pause"}
		spec.Hostname = "pod-name"
		spec.Annotations = map[string]string{"io.kubernetes.cri.container-type": "sandbox"}
		spec.Linux.Sysctl = map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.ip_unprivileged_port_start": "0"}
		for i, m := range spec.Mounts {
			if m.Destination == "/dev/shm" {
				spec.Mounts[i] = specs.Mount{Destination: "/dev/shm", Type: "bind", Source: shm, Options: []string{"rbind", "ro"}}
			}
		}
		if change != nil {
			change(spec)
		}
	}
}

// sandboxes is the Sandbox API of the shim.
func (s *shim) sandboxes() sandboxapi.TTRPCSandboxService {
	return sandboxapi.NewTTRPCSandboxClient(s.client)
}

// newAPIShim starts a shim for a sandbox of the Sandbox API, whose bundle has
// no spec.
func newAPIShim(t *testing.T) *shim {
	t.Helper()
	s := newShimOf(t, options{}, func(s *shim) {
		s.bundle = filepath.Join(s.dir, "bundles", s.id)
		if err := os.MkdirAll(s.bundle, 0o755); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() {
		// Before end, which then only looks for what is left.
		c, err := s.task.Connect(s.call(), &taskapi.ConnectRequest{ID: s.id})
		if err != nil {
			t.Errorf("Connect = %v; want nil", err)
			return
		}
		if _, err := s.sandboxes().ShutdownSandbox(s.call(), &sandboxapi.ShutdownSandboxRequest{SandboxID: s.id}); err != nil {
			t.Errorf("ShutdownSandbox = %v; want nil", err)
		}
		s.waitGone(int(c.ShimPid))
	})
	return s
}

// criConfig is what CRI sends with CreateSandbox.
func criConfig(t *testing.T, change func(*cri.PodSandboxConfig)) *anypb.Any {
	t.Helper()
	cfg := &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: "pod", Namespace: "default", Uid: "1"}, Hostname: "pod-name",
		DnsConfig: &cri.DNSConfig{Servers: []string{"192.0.2.1"}, Searches: []string{"example.org"}, Options: []string{"ndots:5"}},
		Linux: &cri.LinuxPodSandboxConfig{
			Sysctls: map[string]string{"kernel.shm_rmid_forced": "1"},
		},
	}
	if change != nil {
		change(cfg)
	}
	b, err := proto.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return &anypb.Any{TypeUrl: "runtime.v1.PodSandboxConfig", Value: b}
}

// newAPIPod makes a pod by the Sandbox API.
func newAPIPod(t *testing.T, change func(*cri.PodSandboxConfig)) *pod {
	t.Helper()
	return newAPIPodIn(t, "", change)
}

// newAPIPodIn is newAPIPod in a network namespace.
func newAPIPodIn(t *testing.T, netns string, change func(*cri.PodSandboxConfig)) *pod {
	t.Helper()
	s := newAPIShim(t)
	_, err := s.sandboxes().CreateSandbox(s.call(), &sandboxapi.CreateSandboxRequest{
		SandboxID: s.id, BundlePath: s.bundle, NetnsPath: netns, Options: criConfig(t, change),
	})
	if err != nil {
		t.Fatalf("CreateSandbox = %v; want nil", err)
	}
	resp, err := s.sandboxes().StartSandbox(s.call(), &sandboxapi.StartSandboxRequest{SandboxID: s.id})
	if err != nil {
		t.Fatalf("StartSandbox = %v; want nil", err)
	}
	return &pod{shim: s, pid: resp.Pid}
}

// container returns a container of the pod, not created yet. change has the
// spec as CRI writes it: with a pid namespace of its own.
func (p *pod) container(change func(*specs.Spec)) *shim {
	p.t.Helper()
	c := p.in(p.t)
	c.id = newID()
	c.bundle = c.writeBundle(c.id, options{spec: func(spec *specs.Spec) {
		spec.Annotations = map[string]string{
			"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": p.id,
		}
		spec.Hostname = ""
		spec.Process.Args = []string{"sleep", "1000"}
		spec.Linux.Namespaces = []specs.LinuxNamespace{
			{Type: specs.MountNamespace}, {Type: specs.PIDNamespace}, {Type: specs.CgroupNamespace},
			p.namespace(specs.NetworkNamespace, "net"), p.namespace(specs.IPCNamespace, "ipc"), p.namespace(specs.UTSNamespace, "uts"),
		}
		for i, m := range spec.Mounts {
			if m.Destination == "/dev/shm" && p.shm != "" {
				spec.Mounts[i] = specs.Mount{Destination: "/dev/shm", Type: "bind", Source: p.shm, Options: []string{"rbind", "rw"}}
			}
		}
		if change != nil {
			change(spec)
		}
	}})
	return c
}

func (p *pod) namespace(typ specs.LinuxNamespaceType, file string) specs.LinuxNamespace {
	return specs.LinuxNamespace{Type: typ, Path: fmt.Sprintf("/proc/%d/ns/%s", p.pid, file)}
}

// setPID puts a container into another process's pid namespace.
func setPID(spec *specs.Spec, pid uint32) {
	for i, n := range spec.Linux.Namespaces {
		if n.Type == specs.PIDNamespace {
			spec.Linux.Namespaces[i].Path = fmt.Sprintf("/proc/%d/ns/pid", pid)
		}
	}
}

// launch creates and starts the container and returns its pid.
func (s *shim) launch() uint32 {
	s.t.Helper()
	pid := s.mustCreate(nil, false)
	s.mustStart("")
	return pid
}

// discard kills and deletes the container.
func (s *shim) discard() {
	s.t.Helper()
	s.task.Kill(s.call(), &taskapi.KillRequest{ID: s.id, Signal: uint32(syscall.SIGKILL)})
	s.wait("")
	s.delete("")
}

// out runs a command in the container and returns its output.
func (s *shim) out(command string) string {
	s.t.Helper()
	out, errs, status := s.exec(newID(), "sh", "-c", command)
	if status != 0 {
		s.t.Errorf("%s: status %d, stderr %q", command, status, errs)
	}
	return strings.TrimSpace(out)
}

func TestPodShares(t *testing.T) {
	podModes(t, func(t *testing.T, p *pod) {
		a, b := p.container(nil), p.container(nil)
		a.launch()
		defer a.discard()
		b.launch()
		defer b.discard()
		for _, kind := range []string{"ipc", "uts", "net"} {
			if x, y := a.out("readlink /proc/self/ns/"+kind), b.out("readlink /proc/self/ns/"+kind); x != y {
				t.Errorf("%s namespaces = %s, %s; want the same", kind, x, y)
			}
		}
		for _, kind := range []string{"pid", "mnt", "cgroup"} {
			if x, y := a.out("readlink /proc/self/ns/"+kind), b.out("readlink /proc/self/ns/"+kind); x == y {
				t.Errorf("%s namespaces = %s, %s; want two", kind, x, y)
			}
		}
		if got := a.out("hostname"); got != "pod-name" {
			t.Errorf("hostname = %q; want pod-name", got)
		}
		if got := a.out("cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start"); got != "1\n0" {
			t.Errorf("sysctls = %q; want 1 and 0", got)
		}
		a.out("echo shared > /dev/shm/file")
		if got := b.out("cat /dev/shm/file"); got != "shared" {
			t.Errorf("file in /dev/shm = %q; want shared", got)
		}
		if got := b.out("stat -f -c %T /dev/shm"); got != "tmpfs" {
			t.Errorf("/dev/shm is %q; want a tmpfs of the guest's", got)
		}
		// One that asks for none of it has none of it.
		own := p.container(func(s *specs.Spec) {
			for i, n := range s.Linux.Namespaces {
				if n.Type == specs.IPCNamespace || n.Type == specs.UTSNamespace {
					s.Linux.Namespaces[i].Path = ""
				}
			}
			s.Hostname = "own-name"
			for i, m := range s.Mounts {
				if m.Destination == "/dev/shm" {
					s.Mounts[i] = specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}}
				}
			}
		})
		own.launch()
		defer own.discard()
		for _, kind := range []string{"ipc", "uts"} {
			if x, y := a.out("readlink /proc/self/ns/"+kind), own.out("readlink /proc/self/ns/"+kind); x == y {
				t.Errorf("%s namespace of a container with its own = %s; want another than the pod's", kind, x)
			}
		}
		if got := own.out("hostname; ls /dev/shm"); got != "own-name" {
			t.Errorf("host name and /dev/shm of a container with its own = %q; want own-name and no file", got)
		}
		if got := a.out("hostname"); got != "pod-name" {
			t.Errorf("host name = %q after another container has set its own; want pod-name", got)
		}
		if got := a.out("ps -o comm | grep -c sleep"); got != "1" {
			t.Errorf("container sees %s processes called sleep; want its own alone", got)
		}
	})
}

// What the Sandbox API leaves to the runtime.
func TestPodFiles(t *testing.T) {
	p := newAPIPod(t, nil)
	c := p.container(nil)
	c.launch()
	defer c.discard()
	if got := c.out("cat /etc/resolv.conf"); got != "search example.org\nnameserver 192.0.2.1\noptions ndots:5" {
		t.Errorf("/etc/resolv.conf = %q", got)
	}
	if got := c.out("cat /etc/hostname"); got != "pod-name" {
		t.Errorf("/etc/hostname = %q; want pod-name", got)
	}
	if got := c.out("grep -c . /etc/hosts"); got == "0" {
		t.Error("/etc/hosts is empty")
	}
}

func TestPodPIDNamespaces(t *testing.T) {
	podModes(t, func(t *testing.T, p *pod) {
		shared := p.container(func(s *specs.Spec) { setPID(s, p.pid) })
		other := p.container(func(s *specs.Spec) { setPID(s, p.pid); s.Process.Args = []string{"sleep", "4321"} })
		shared.launch()
		defer shared.discard()
		other.launch()
		defer other.discard()
		if got := shared.out("tr '\\0' ' ' < /proc/1/cmdline"); !strings.HasPrefix(got, "/pause") {
			t.Errorf("first process = %q; want /pause", got)
		}
		if got := shared.out("ps -o args | grep -c 'sleep 4321$'"); got != "1" {
			t.Errorf("the other container's process is seen %s times; want once", got)
		}

		target := p.container(func(s *specs.Spec) { s.Process.Args = []string{"sleep", "1234"} })
		pid := target.launch()
		defer target.discard()
		debug := p.container(func(s *specs.Spec) { setPID(s, pid) })
		debug.launch()
		defer debug.discard()
		if got := debug.out("tr '\\0' ' ' < /proc/1/cmdline"); got != "sleep 1234" {
			t.Errorf("first process seen from a container in its target's namespace = %q; want sleep 1234", got)
		}
		// Orphans are reaped.
		shared.out("(sleep 0.01 &) ; :")
		shared.out("i=0; while ps -o stat,args | grep -q '^Z'; do i=$((i+1)); [ $i -lt 100 ] || exit 1; sleep 0.05; done")
	})
}

func TestPodContainersAreApart(t *testing.T) {
	podModes(t, func(t *testing.T, p *pod) {
		limit := int64(64 << 20)
		greedy := p.container(func(s *specs.Spec) {
			s.Process.Args = []string{"sh", "-c", "tail -c 200m /dev/zero | wc -c"}
			s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit}
		})
		neighbour := p.container(nil)
		neighbour.launch()
		defer neighbour.discard()
		greedy.mustCreate(nil, false)
		greedy.mustStart("")
		greedy.wait("")
		waitFor(t, p.events, func(e *eventsapi.TaskOOM) bool { return e.ContainerID == greedy.id })
		greedy.delete("")
		if got := neighbour.out("echo alive"); got != "alive" {
			t.Errorf("neighbour says %q", got)
		}
		killed := p.container(nil)
		killed.launch()
		killed.discard()
		if got := neighbour.out("echo alive"); got != "alive" {
			t.Errorf("neighbour says %q", got)
		}
		// A container is started again in the pod that lives on.
		again := p.container(nil)
		again.launch()
		again.discard()
	})
}

func nativeError(err error) error { return errgrpc.ToNative(err) }

func TestSandboxAPI(t *testing.T) {
	p := newAPIPod(t, nil)
	api := p.sandboxes()
	c := p.container(nil)
	c.launch()

	plat, err := api.Platform(p.call(), &sandboxapi.PlatformRequest{SandboxID: p.id})
	if err != nil || plat.Platform.OS != "linux" || plat.Platform.Architecture == "" {
		t.Errorf("Platform = %v, %v; want linux", plat, err)
	}
	if _, err := api.PingSandbox(p.call(), &sandboxapi.PingRequest{SandboxID: p.id}); err != nil {
		t.Errorf("PingSandbox = %v; want nil", err)
	}
	st, err := api.SandboxStatus(p.call(), &sandboxapi.SandboxStatusRequest{SandboxID: p.id, Verbose: true})
	if err != nil || st.State != "SANDBOX_READY" || st.Pid != p.pid || !strings.Contains(st.Info["info"], fmt.Sprint(p.pid)) || st.Info["vmrt"] == "" {
		t.Errorf("SandboxStatus = %v, %v; want it ready, with the pid in its info", st, err)
	}
	m, err := api.SandboxMetrics(p.call(), &sandboxapi.SandboxMetricsRequest{SandboxID: p.id})
	if err != nil || !strings.HasSuffix(m.GetMetrics().GetData().GetTypeUrl(), "io.containerd.cgroups.v2.Metrics") {
		t.Errorf("SandboxMetrics = %v, %v; want cgroup v2 metrics", m, err)
	}
	// containerd shuts down after each task's delete; the pod stays.
	gone := p.container(nil)
	gone.launch()
	gone.discard()
	if _, err := p.task.Shutdown(p.call(), &taskapi.ShutdownRequest{ID: gone.id}); err != nil {
		t.Errorf("Task.Shutdown = %v; want nil", err)
	}

	waited := make(chan *sandboxapi.WaitSandboxResponse, 1)
	go func() {
		w, err := api.WaitSandbox(p.ctx, &sandboxapi.WaitSandboxRequest{SandboxID: p.id})
		if err != nil {
			t.Errorf("WaitSandbox = %v; want nil", err)
		}
		waited <- w
	}()
	for range 2 {
		if _, err := api.StopSandbox(p.call(), &sandboxapi.StopSandboxRequest{SandboxID: p.id}); err != nil {
			t.Errorf("StopSandbox = %v; want nil", err)
		}
	}
	if w := <-waited; w.GetExitStatus() != 0 || w.GetExitedAt() == nil {
		t.Errorf("WaitSandbox after StopSandbox = %v; want status 0", w)
	}
	if got := c.wait(""); got != 137 {
		t.Errorf("container's status = %d; want 137", got)
	}
	if st, err := api.SandboxStatus(p.call(), &sandboxapi.SandboxStatusRequest{SandboxID: p.id}); err != nil || st.State != "SANDBOX_NOTREADY" {
		t.Errorf("SandboxStatus = %v, %v; want it not ready", st, err)
	}
	if _, err := api.PingSandbox(p.call(), &sandboxapi.PingRequest{SandboxID: p.id}); err == nil {
		t.Error("PingSandbox of a stopped sandbox = nil; want an error")
	}
	late := p.container(nil)
	if _, err := late.create(nil, false); !errdefs.IsUnavailable(nativeError(err)) {
		t.Errorf("Create in a stopped sandbox = %v; want unavailable", err)
	}
	c.delete("")
}

// A pod is resized within what its virtual machine was started with.
func TestSandboxResize(t *testing.T) {
	p := newAPIPod(t, func(c *cri.PodSandboxConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{CpuQuota: 200000, CpuPeriod: 100000}
	})
	c := p.container(nil)
	c.launch()
	defer c.discard()
	if got := c.out("nproc"); got != "2" {
		t.Errorf("nproc = %s; want 2", got)
	}
	resize := func(resources string) error {
		_, err := p.sandboxes().UpdateSandbox(p.call(), &sandboxapi.UpdateSandboxRequest{
			SandboxID: p.id, Fields: []string{"extensions"},
			Sandbox: &types.Sandbox{Extensions: map[string]*anypb.Any{
				"updated-resources": {TypeUrl: "io.containerd.cri.v1/UpdatedResources", Value: []byte(resources)},
			}},
		})
		return nativeError(err)
	}
	if err := resize(`{"Resources":{"cpu_period":100000,"cpu_quota":100000}}`); err != nil {
		t.Errorf("UpdateSandbox to one CPU = %v; want nil", err)
	}
	if got := c.out("nproc"); got != "1" {
		t.Errorf("nproc = %s; want 1", got)
	}
	if err := resize(`{"Resources":{"cpu_period":100000,"cpu_quota":200000}}`); err != nil {
		t.Errorf("UpdateSandbox back to two CPUs = %v; want nil", err)
	}
	if got := c.out("nproc"); got != "2" {
		t.Errorf("nproc = %s; want 2", got)
	}
	for resources, is := range map[string]func(error) bool{
		`{"Resources":{"memory_limit_in_bytes":1073741824}}`: errdefs.IsFailedPrecondition,
		`{"Resources":{"memory_limit_in_bytes":-7}}`:         errdefs.IsInvalidArgument,
		`{"Resources":`: errdefs.IsInvalidArgument,
	} {
		if err := resize(resources); err == nil || !is(err) {
			t.Errorf("UpdateSandbox with %s = %v; want another kind", resources, err)
		}
	}
	if err := resize(`{}`); err != nil {
		t.Errorf("UpdateSandbox without resources = %v; want nil", err)
	}
}

// The end of the virtual machine ends the pod.
func TestPodVMKilled(t *testing.T) {
	podModes(t, func(t *testing.T, p *pod) {
		c := p.container(nil)
		c.launch()
		if err := syscall.Kill(p.findVM(), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if got := c.wait(""); got != 137 {
			t.Errorf("container's status = %d; want 137", got)
		}
		if p.shm != "" {
			if got := p.wait(""); got != 137 {
				t.Errorf("pod's status = %d; want 137", got)
			}
		} else {
			w, err := p.sandboxes().WaitSandbox(p.call(), &sandboxapi.WaitSandboxRequest{SandboxID: p.id})
			if err != nil || w.ExitStatus != 137 {
				t.Errorf("WaitSandbox = %v, %v; want status 137", w, err)
			}
		}
		c.delete("")
	})
}
