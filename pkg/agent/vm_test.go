package agent_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/guest/initramfs"
	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/hypervisor/accel"
	"github.com/vmrt/vmrt/pkg/hypervisor/qemu"
	"github.com/vmrt/vmrt/pkg/vsock"
	"github.com/vmrt/vmrt/tests/platform"
)

// bootTimeout bounds a boot on a busy machine without hardware virtualisation.
const bootTimeout = 60 * time.Second

// guestFiles returns the folder of the guest files to test, by kernel. They are
// below root, or where VMRT_GUEST or the build has them.
func guestFiles(t testing.TB, root, kind string) string {
	t.Helper()
	if root == "" {
		root = os.Getenv("VMRT_GUEST")
	}
	if root == "" {
		root = "../../bin/guest"
	}
	dir := filepath.Join(root, kind)
	if _, err := guest.Load(dir); err != nil {
		t.Skipf("needs guest files, which 'make guest' builds: %v", err)
	}
	return dir
}

// virtual is a virtual machine with an agent in it.
type virtual struct {
	transport vsock.Transport
	vm        hypervisor.VM
	host      vsock.Conn // the connection of the handshake
	hello     api.Hello
	begin     time.Time     // of the VMM
	ready     time.Duration // from then to Hello
	cpu       time.Duration // of the VMM until Hello
	console   *console
}

func (*virtual) cgroups() bool    { return true }
func (*virtual) ownRuntime() bool { return true }

func (v *virtual) dial(ctx context.Context, port uint32) (net.Conn, error) {
	return v.transport.Dial(ctx, port)
}

// console keeps what the guest's console says.
type console struct {
	mu    sync.Mutex
	lines []string
}

func (c *console) line(s string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lines = append(c.lines, s)
}

func (c *console) text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(c.lines, "\n")
}

// spec is how a test wants its machine.
type vmSpec struct {
	root    string // of guest files; "" is the usual one
	kind    string
	cmdline []string
	cpus    int
	welcome *api.Welcome // nil: the usual one
	// programs are more files for the containers' /bin, by name.
	programs map[string]string
	// asBuilt boots the guest files as they are: with the agent in them, and
	// without files for containers.
	asBuilt bool
}

// bootVM boots a machine and greets it.
func bootVM(t testing.TB, s vmSpec) *virtual {
	t.Helper()
	dir := guestFiles(t, s.root, s.kind)
	binary, err := platform.QEMU()
	if err != nil {
		t.Skip(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
	defer cancel()
	accelerator, err := platform.Accelerator(ctx, accel.Config{})
	if err != nil {
		t.Fatal(err)
	}
	v := &virtual{console: &console{}}
	if v.transport, err = vsock.Open(vsock.Auto); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.transport.Close() })
	spec := hypervisor.Spec{
		Name: "vmrt-agent-test", Accelerator: accelerator, CPUs: max(s.cpus, 1), MemoryMiB: 256,
		CmdlineDevices: guest.CmdlineDevices(s.kind),

		Kernel:  filepath.Join(dir, guest.KernelFile),
		Cmdline: append([]string{fmt.Sprintf("%s=%d", api.CmdlinePort, v.transport.HostPort())}, s.cmdline...),
		Vsock:   v.transport.Device(),
	}
	if s.asBuilt {
		spec.Initrd = filepath.Join(dir, guest.InitramfsFile)
	} else {
		spec.Initrd = extend(t, filepath.Join(dir, guest.InitramfsFile), s.programs)
	}
	v.vm, err = qemu.Launch(ctx, qemu.Config{Binary: binary, Start: lockedStart(t, &v.begin), Console: v.console.line, CacheDir: t.TempDir()}, spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.vm.Kill(context.Background()) })
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("console:\n%s", v.console.text())
		}
	})
	if v.host, err = v.transport.Accept(ctx); err != nil {
		t.Fatalf("the agent does not dial: %v, %v", err, v.vm.Err())
	}
	t.Cleanup(func() { v.host.Close() })
	if err := api.ReadMessage(v.host, &v.hello); err != nil {
		t.Fatal(err)
	}
	v.ready, v.cpu = time.Since(v.begin), cpuTime(t, v.vm.Pid())
	if s.welcome == nil {
		s.welcome = &api.Welcome{Time: timestamppb.Now(), Seed: bytes.Repeat([]byte{7}, 64), Hostname: "pod"}
	}
	if err := api.WriteMessage(v.host, s.welcome); err != nil {
		t.Fatal(err)
	}
	return v
}

// lockedStart starts a command from a thread that lives as long as the test:
// QEMU ends with the thread that has forked it. It notes the time in begin.
func lockedStart(t testing.TB, begin *time.Time) hypervisor.StartFunc {
	commands, results := make(chan *exec.Cmd), make(chan error)
	go func() {
		runtime.LockOSThread()
		for cmd := range commands {
			results <- cmd.Start()
		}
	}()
	t.Cleanup(func() { close(commands) })
	return func(cmd *exec.Cmd) error {
		*begin = time.Now()
		commands <- cmd
		return <-results
	}
}

// buildAgent builds the agent of this tree, once.
var buildAgent = sync.OnceValues(func() (string, error) {
	return build("vm-agent", "../../cmd/vm-agent")
})

// build builds a static program into the folder of the test run.
func build(name, pkg string) (string, error) {
	program := filepath.Join(buildDir, name)
	cmd := exec.Command("go", "build", "-tags=no_grpc", "-trimpath", "-ldflags=-s -w", "-o", program, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", pkg, err, out)
	}
	return program, nil
}

// extend returns an initrd with the agent of this tree and the containers'
// files behind what is in path: of two files the kernel keeps the later.
func extend(t testing.TB, path string, programs map[string]string) string {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skipf("needs a static busybox: %v", err)
	}
	agent, err := buildAgent()
	if err != nil {
		t.Fatal(err)
	}
	initrd, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var a initramfs.Archive
	for _, dir := range []string{"proc", "dev", "tmp", "sys"} {
		err = errors.Join(err, a.Dir("rootfs/"+dir, 0o755))
	}
	for name, file := range programs {
		err = errors.Join(err, addProgram(&a, "rootfs/bin/"+name, file))
	}
	err = errors.Join(err, addProgram(&a, "rootfs/bin/busybox", busybox), addProgram(&a, "init", agent))
	err = errors.Join(err, a.File("rootfs/etc/passwd", 0o644, []byte("root:x:0:0::/:/bin/sh\n")))
	for _, name := range applets {
		err = errors.Join(err, a.Symlink("rootfs/bin/"+name, "busybox"))
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

func addProgram(a *initramfs.Archive, name, file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	return a.File(name, 0o755, b)
}

// TestVM runs the suite in a virtual machine.
func TestVM(t *testing.T) {
	for _, kind := range []string{guest.Tuned, guest.Stock} {
		t.Run(kind, func(t *testing.T) {
			v := bootVM(t, vmSpec{kind: kind, cpus: 2, cmdline: []string{"maxcpus=1"}, programs: loopbackPrograms(t)})
			t.Logf("kernel %s, agent %s ready after %v", v.hello.Kernel, v.hello.Version, v.ready)
			if kind == guest.Tuned {
				suite(t, v)
			} else {
				smoke(t, v)
			}
			verbs(t, v)
			dials(t, v)
		})
	}
}
