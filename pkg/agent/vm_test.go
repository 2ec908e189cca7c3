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
)

// bootTimeout bounds a boot on a busy machine without hardware virtualisation.
const bootTimeout = 60 * time.Second

// guestFiles returns the folder of the guest files to test, by kernel.
func guestFiles(t testing.TB, kind string) string {
	t.Helper()
	root := os.Getenv("VMRT_GUEST")
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
	ready     time.Duration // from the exec of the VMM to Hello
	console   *console
}

func (*virtual) cgroups() bool { return true }

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
	kind    string
	cmdline []string
	cpus    int
	welcome *api.Welcome // nil: the usual one
	// programs are more files for the containers' /bin, by name.
	programs map[string]string
}

// bootVM boots a machine and greets it.
func bootVM(t testing.TB, s vmSpec) *virtual {
	t.Helper()
	dir := guestFiles(t, s.kind)
	binary, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skipf("needs QEMU: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
	defer cancel()
	verdict, err := accel.Choose(ctx, hypervisor.Auto, accel.Config{})
	if err != nil {
		t.Fatal(err)
	}
	v := &virtual{console: &console{}}
	if v.transport, err = vsock.Open(vsock.Auto); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.transport.Close() })
	spec := hypervisor.Spec{
		Name: "vmrt-agent-test", Accelerator: verdict.Accelerator, CPUs: max(s.cpus, 1), MemoryMiB: 256,
		Kernel: filepath.Join(dir, guest.KernelFile), Initrd: withRootfs(t, filepath.Join(dir, guest.InitramfsFile), s.programs),
		Cmdline: append([]string{fmt.Sprintf("%s=%d", api.CmdlinePort, v.transport.HostPort())}, s.cmdline...),
		Vsock:   v.transport.Device(),
	}
	begin := time.Now()
	v.vm, err = qemu.Launch(ctx, qemu.Config{Binary: binary, Start: lockedStart(t), Console: v.console.line, CacheDir: t.TempDir()}, spec)
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
	v.ready = time.Since(begin)
	if s.welcome == nil {
		s.welcome = &api.Welcome{Time: timestamppb.Now(), Seed: bytes.Repeat([]byte{7}, 64), Hostname: "pod"}
	}
	if err := api.WriteMessage(v.host, s.welcome); err != nil {
		t.Fatal(err)
	}
	return v
}

// lockedStart starts a command from a thread that lives as long as the test:
// QEMU ends with the thread that has forked it.
func lockedStart(t testing.TB) hypervisor.StartFunc {
	commands, results := make(chan *exec.Cmd), make(chan error)
	go func() {
		runtime.LockOSThread()
		for cmd := range commands {
			results <- cmd.Start()
		}
	}()
	t.Cleanup(func() { close(commands) })
	return func(cmd *exec.Cmd) error {
		commands <- cmd
		return <-results
	}
}

// withRootfs returns an initrd with the containers' files behind that of path.
func withRootfs(t testing.TB, path string, programs map[string]string) string {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skipf("needs a static busybox: %v", err)
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
		err = errors.Join(err, addProgram(&a, name, file))
	}
	err = errors.Join(err, addProgram(&a, "busybox", busybox))
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
	return a.File("rootfs/bin/"+name, 0o755, b)
}

// TestVM runs the suite in a virtual machine.
func TestVM(t *testing.T) {
	for _, kind := range []string{guest.Tuned, guest.Stock} {
		t.Run(kind, func(t *testing.T) {
			v := bootVM(t, vmSpec{kind: kind})
			t.Logf("kernel %s, agent %s ready after %v", v.hello.Kernel, v.hello.Version, v.ready)
			suite(t, v)
		})
	}
}
