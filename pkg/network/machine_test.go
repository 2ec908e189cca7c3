//go:build linux

package network_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/guest/initramfs"
	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/hypervisor/accel"
	"github.com/vmrt/vmrt/pkg/hypervisor/qemu"
	"github.com/vmrt/vmrt/pkg/network"
	"github.com/vmrt/vmrt/pkg/vsock"
	"github.com/vmrt/vmrt/tests/platform"
	"github.com/vmrt/vmrt/tests/probe"
)

// bootTimeout bounds a boot on a busy machine without hardware virtualisation.
const bootTimeout = 3 * time.Minute

// missing skips a test of the virtual machine, unless it must run.
func missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("VMRT_REQUIRE_VM") == "1" {
		t.Fatalf("VMRT_REQUIRE_VM=1, but: "+format, args...)
	}
	t.Skipf(format, args...)
}

// machine is a virtual machine in a pod's namespace, with a container in it
// that runs a probe.
type machine struct {
	t     testing.TB
	pod   netns
	net   *network.Network
	vmm   int // QEMU's process
	agent api.AgentClient
	probe *rpc.Client
}

// machineSpec is how a test wants its machine.
type machineSpec struct {
	kind    string // of guest files; tuned if empty
	vsock   string
	cpus    int
	spares  int
	cmdline []string
}

// boot starts a virtual machine in the pod's namespace, as it is now, and
// returns when a container runs in it.
func boot(t testing.TB, pod netns, s machineSpec) *machine {
	t.Helper()
	files := guestFiles(t, orElse(s.kind, guest.Tuned))
	binary, err := exec.LookPath(orElse(os.Getenv("VMRT_QEMU"), "qemu-system-x86_64"))
	if err != nil {
		missing(t, "no QEMU: %v", err)
	}
	initrd := testInitrd(t, filepath.Join(files, guest.InitramfsFile))
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	accelerator, err := platform.Accelerator(ctx, accel.Config{})
	if err != nil {
		t.Fatal(err)
	}
	transport, err := vsock.Open(orElse(s.vsock, vsock.Auto))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { transport.Close() })
	m := &machine{t: t, pod: pod}
	m.net = open(t, pod, network.Options{Queues: s.cpus, Spares: s.spares})
	var mu sync.Mutex
	var console bytes.Buffer
	vm, err := qemu.Launch(ctx, qemu.Config{
		Binary: binary, Start: pod.Start, CacheDir: t.TempDir(),
		Console: func(line string) {
			mu.Lock()
			defer mu.Unlock()
			fmt.Fprintln(&console, line)
		},
	}, hypervisor.Spec{
		Name: "network-test", Accelerator: accelerator, CPUs: max(s.cpus, 1), MemoryMiB: 256,
		Kernel: filepath.Join(files, guest.KernelFile), Initrd: initrd,
		// The kernel's dummy driver makes one of its own.
		Cmdline: append([]string{fmt.Sprintf("%s=%d", api.CmdlinePort, transport.HostPort()), "dummy.numdummies=0"}, s.cmdline...),
		Vsock:   transport.Device(),
		NICs:    m.net.NICs(),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
		defer cancel()
		if err := vm.Kill(ctx); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			mu.Lock()
			defer mu.Unlock()
			t.Logf("console:\n%s", &console)
		}
	})
	for _, f := range []*os.File{transport.Device().Backend, transport.Device().VhostFD} {
		if f != nil {
			f.Close()
		}
	}
	m.vmm = vm.Pid()
	m.net.ReleaseFiles()
	go func() {
		select {
		case <-vm.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	m.greet(ctx, transport, vm)
	m.startProbe(ctx, transport)
	return m
}

func orElse[T comparable](v, other T) T {
	var zero T
	if v == zero {
		return other
	}
	return v
}

func guestFiles(t testing.TB, kind string) string {
	t.Helper()
	dir := filepath.Join(orElse(os.Getenv("VMRT_GUEST"), "../../bin/guest"), kind)
	if _, err := guest.Load(dir); err != nil {
		missing(t, "no guest files, which 'make initramfs' builds: %v", err)
	}
	return dir
}

// greet answers the agent's Hello, and connects to it.
func (m *machine) greet(ctx context.Context, transport vsock.Transport, vm hypervisor.VM) {
	m.t.Helper()
	host, err := transport.Accept(ctx)
	if err != nil {
		m.t.Fatalf("the agent does not dial: %v, %v", err, vm.Err())
	}
	m.t.Cleanup(func() { host.Close() })
	var hello api.Hello
	err = api.ReadMessage(host, &hello)
	if err == nil {
		err = api.WriteMessage(host, &api.Welcome{Time: timestamppb.Now(), Seed: bytes.Repeat([]byte{7}, 64), Hostname: "pod"})
	}
	if err != nil {
		m.t.Fatal(err)
	}
	conn, err := transport.Dial(ctx, api.PortRPC)
	if err != nil {
		m.t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	m.t.Cleanup(func() { client.Close() })
	m.agent = api.NewAgentClient(client)
	m.configure(ctx)
	task := taskapi.NewTTRPCTaskClient(client)
	bundle, err := json.Marshal(probeSpec())
	if err == nil {
		_, err = m.agent.WriteBundle(ctx, &api.WriteBundleRequest{Id: "probe", Config: bundle})
	}
	if err != nil {
		m.t.Fatal(err)
	}
	runc, err := typeurl.MarshalAnyToProto(&options.Options{BinaryName: api.Runtime})
	if err != nil {
		m.t.Fatal(err)
	}
	if _, err := task.Create(ctx, &taskapi.CreateTaskRequest{ID: "probe", Bundle: api.BundlePath("probe"), Options: runc}); err != nil {
		m.t.Fatal(err)
	}
	if _, err := task.Start(ctx, &taskapi.StartRequest{ID: "probe"}); err != nil {
		m.t.Fatal(err)
	}
}

// configure tells the guest what the network is.
func (m *machine) configure(ctx context.Context) {
	m.t.Helper()
	begin := time.Now()
	if _, err := m.agent.ConfigureNetwork(ctx, m.net.Request()); err != nil {
		m.t.Fatalf("ConfigureNetwork() = %v", err)
	}
	m.t.Logf("ConfigureNetwork took %v", time.Since(begin))
}

// probeSpec is a container as a pod has it: with the machine's network.
func probeSpec() *specs.Spec {
	caps := []string{"CAP_NET_RAW", "CAP_NET_BIND_SERVICE"}
	return &specs.Spec{
		Version: "1.0.2",
		Root:    &specs.Root{Path: "/rootfs", Readonly: true},
		Process: &specs.Process{
			Args: []string{"/bin/probe"}, Cwd: "/", Env: []string{"PATH=/bin"},
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/sys", Type: "bind", Source: "/sys", Options: []string{"rbind", "ro"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: "/vmrt/probe",
			Namespaces:  []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace}},
		},
	}
}

// startProbe connects to the container's probe, once it listens.
func (m *machine) startProbe(ctx context.Context, transport vsock.Transport) {
	m.t.Helper()
	for {
		c, err := transport.Dial(ctx, probe.Port)
		if err == nil {
			m.probe = rpc.NewClient(c)
			m.t.Cleanup(func() { m.probe.Close() })
			return
		}
		if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ECONNRESET) {
			m.t.Fatalf("connect to the probe: %v", err)
		}
		select {
		case <-ctx.Done():
			m.t.Fatalf("the probe does not listen: %v", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Call does something in the container.
func (m *machine) Call(method string, request, answer any) error {
	return m.probe.Call("Probe."+method, request, answer)
}

// run runs busybox in the container.
func (m *machine) run(command string) string {
	m.t.Helper()
	var out string
	if err := m.Call("Run", append([]string{"/bin/busybox"}, strings.Fields(command)...), &out); err != nil {
		m.t.Fatal(err)
	}
	return out
}

var buildProbe = sync.OnceValues(func() ([]byte, error) { return build("pkg/network/internal/probe/guest") })
var buildAgent = sync.OnceValues(func() ([]byte, error) { return build("cmd/vm-agent") })

// build returns a static program.
func build(pkg string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "vmrt-network-test-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	program, err := platform.Build(pkg, dir)
	if err != nil {
		return nil, err
	}
	return os.ReadFile(program)
}

// testInitrd returns the guest's initramfs with the agent of this tree and the
// container's files in it: of two files the kernel keeps the later.
func testInitrd(t testing.TB, path string) string {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		missing(t, "no static busybox: %v", err)
	}
	shell, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	program, err := buildProbe()
	if err != nil {
		t.Fatal(err)
	}
	initrd, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var a initramfs.Archive
	for _, dir := range []string{"proc", "dev", "sys"} {
		err = errors.Join(err, a.Dir("rootfs/"+dir, 0o755))
	}
	err = errors.Join(err, a.File("rootfs/bin/busybox", 0o755, shell), a.File("rootfs/bin/probe", 0o755, program))
	// In the nested machine a build takes minutes, and the guest files are new.
	if os.Getenv("VMRT_LAB") == "" {
		agent, buildErr := buildAgent()
		err = errors.Join(err, buildErr, a.File("init", 0o755, agent))
	}
	if err != nil {
		t.Fatal(err)
	}
	out := bytes.NewBuffer(initrd)
	if _, err := a.WriteTo(out); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(name, out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}
