// Package conformance drives the shim binary as containerd does, over ttrpc,
// without containerd: what the Task API promises, with a real virtual machine
// behind it.
package conformance

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/hypervisor/accel"
	"github.com/vmrt/vmrt/tests/platform"
)

// callTimeout bounds each request of a test. In the nested machine a container
// takes half a minute to start when nothing else runs.
var callTimeout = func() time.Duration {
	if platform.Lab() {
		return 5 * time.Minute
	}
	return 90 * time.Second
}()

const namespace = "conformance"

// binDir is where `make build` puts the binaries, or what VMRT_BIN names.
func binDir() string {
	if dir := os.Getenv("VMRT_BIN"); dir != "" {
		return dir
	}
	return "../../bin"
}

// shimDir is binDir as an absolute path.
func shimDir(t testing.TB) string {
	t.Helper()
	dir, err := filepath.Abs(binDir())
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// requireVM skips the test where no virtual machine can run, and fails it where
// one must (VMRT_REQUIRE_VM).
func requireVM(t testing.TB) {
	t.Helper()
	missing := ""
	switch {
	case os.Geteuid() != 0:
		missing = "needs root"
	case !exists(filepath.Join(shimDir(t), "containerd-shim-vmrt-v2")) || !exists(filepath.Join(shimDir(t), "guest")):
		missing = "needs `make build`"
	default:
		if _, err := platform.QEMU(); err != nil {
			missing = err.Error()
		} else if _, err := measured(); err != nil {
			missing = err.Error()
		}
	}
	if missing == "" {
		return
	}
	if os.Getenv("VMRT_REQUIRE_VM") != "" {
		t.Fatal("VMRT_REQUIRE_VM is set: " + missing)
	}
	t.Skip(missing)
}

// measured has the accelerator probed, so that each shim finds the verdict.
var measured = sync.OnceValues(func() (hypervisor.Accelerator, error) {
	return platform.Accelerator(context.Background(), accel.Config{})
})

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// shim is a running shim, seen from one of its containers. Its methods fail t,
// so a subtest uses a shim of its own: see in and add.
type shim struct {
	t      testing.TB
	id     string
	bundle string
	dir    string
	events *events
	// socket is the path of the shim's socket.
	socket string
	client *ttrpc.Client
	task   taskapi.TTRPCTaskService
	log    *shimLog
	config string
	ctx    context.Context
	// runtime is what is under test; nil for vmrt.
	runtime *runtime
	// pids are those that Create has returned, of all containers of the shim.
	pids *pidList
	// killed is set by tests that kill the shim: its socket then stays until
	// containerd replaces it, as runc's does.
	killed bool
}

// pidList is a list of processes on the host.
type pidList struct {
	mu  sync.Mutex
	all []uint32
}

func (l *pidList) add(pid uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, pid)
}

// options change what newShim makes.
type options struct {
	// spec changes the OCI spec before it is written.
	spec func(*specs.Spec)
	// config is the configuration file's content, beside the default.
	config string
	// rootfs changes the root file system.
	rootfs func(dir string)
	// bundle changes the bundle once it is complete.
	bundle func(dir string)
	// runtime is what is tested in place of vmrt.
	runtime *runtime
}

// runtime is a shim binary other than vmrt's, as a control.
type runtime struct {
	binary string
	// options are what its Create wants.
	options *anypb.Any
}

var nextID struct {
	sync.Mutex
	n int
}

func newID() string {
	nextID.Lock()
	defer nextID.Unlock()
	nextID.n++
	return fmt.Sprintf("c%d-%d", os.Getpid(), nextID.n)
}

// newShim starts the shim binary for a new container and connects to it. It is
// shut down, and looked over for what it left, at the end of the test.
func newShim(t testing.TB, o options) *shim {
	t.Helper()
	return newShimOf(t, o, func(s *shim) { s.bundle = s.writeBundle(s.id, o) })
}

// newShimOf is newShim with a bundle that makeBundle makes.
func newShimOf(t testing.TB, o options, makeBundle func(*shim)) *shim {
	t.Helper()
	if o.runtime == nil {
		requireVM(t)
	}
	s := &shim{
		t: t, id: newID(), dir: t.TempDir(), events: &events{new: make(chan struct{})},
		log: &shimLog{}, runtime: o.runtime, pids: &pidList{},
	}
	s.ctx = namespaces.WithNamespace(context.Background(), namespace)
	s.writeConfig(o.config)
	makeBundle(s)
	address := s.serveEvents()
	s.start(address)
	t.Cleanup(s.end)
	return s
}

// in returns the same shim and container for a subtest.
func (s *shim) in(t testing.TB) *shim {
	view := *s
	view.t = t
	return &view
}

// add makes the bundle of a further container, which the same shim, and so the
// same virtual machine, is asked to run. It is deleted at the end of t.
func (s *shim) add(t testing.TB, o options) *shim {
	t.Helper()
	c := s.in(t)
	c.id = newID()
	c.bundle = c.writeBundle(c.id, o)
	t.Cleanup(c.remove)
	return c
}

func (s *shim) writeConfig(extra string) {
	s.config = filepath.Join(s.dir, "config.toml")
	content := fmt.Sprintf("state_dir = %q\n%s\n", filepath.Join(s.dir, "state"), platform.Settings(extra))
	if err := os.WriteFile(s.config, []byte(content), 0o644); err != nil {
		s.t.Fatal(err)
	}
}

// writeBundle makes a bundle with a busybox root file system.
func (s *shim) writeBundle(id string, o options) string {
	bundle := filepath.Join(s.dir, "bundles", id)
	rootfs := filepath.Join(bundle, "rootfs")
	makeRootfs(s.t, rootfs)
	if o.rootfs != nil {
		o.rootfs(rootfs)
	}
	spec := defaultSpec(id)
	if o.spec != nil {
		o.spec(spec)
	}
	b, err := json.Marshal(spec)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), b, 0o644); err != nil {
		s.t.Fatal(err)
	}
	if o.bundle != nil {
		o.bundle(bundle)
	}
	return bundle
}

// serveEvents listens as containerd's event service.
func (s *shim) serveEvents() string {
	path := filepath.Join(s.dir, "events.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		s.t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		s.t.Fatal(err)
	}
	eventsapi.RegisterTTRPCEventsService(server, s.events)
	go server.Serve(context.Background(), l)
	s.t.Cleanup(func() { server.Close() })
	return path
}

// bootstrap is what containerd writes to `shim start`.
func (s *shim) bootstrap(events, sockets string) []byte {
	s.t.Helper()
	b, err := proto.Marshal(&bootapi.BootstrapParams{
		InstanceID: s.id, Namespace: namespace, LogLevel: bootapi.LogLevel_LOG_LEVEL_DEBUG,
		ContainerdGrpcAddress: filepath.Join(s.dir, "containerd.sock"), ContainerdTtrpcAddress: events,
		SocketDir: proto.String(sockets),
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

// start runs `shim start` and connects to the address that it prints.
func (s *shim) start(events string) {
	s.t.Helper()
	s.openLog()
	out := s.runBinary(bytes.NewReader(s.bootstrap(events, s.socketDir())), "start")
	var result bootapi.BootstrapResult
	if err := proto.Unmarshal(out, &result); err != nil {
		s.t.Fatalf("shim start printed %q: %v", out, err)
	}
	if result.Version != 3 || result.Protocol != "ttrpc" {
		s.t.Fatalf("shim start = version %d, protocol %q; want 3, ttrpc", result.Version, result.Protocol)
	}
	s.socket = strings.TrimPrefix(result.Address, "unix://")
	conn, err := net.Dial("unix", s.socket)
	if err != nil {
		s.t.Fatal(err)
	}
	s.client = ttrpc.NewClient(conn)
	s.task = taskapi.NewTTRPCTaskClient(s.client)
}

// socketDir is short: a unix socket's path has at most 107 bytes.
func (s *shim) socketDir() string {
	s.t.Helper()
	dir, err := os.MkdirTemp("", "vs")
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		left, _ := os.ReadDir(dir)
		for _, f := range left {
			if !s.killed {
				s.t.Errorf("socket left behind: %s", f.Name())
			}
		}
		os.RemoveAll(dir)
	})
	return dir
}

// runBinary runs the shim binary in the bundle, as containerd does.
func (s *shim) runBinary(stdin io.Reader, action string) []byte {
	s.t.Helper()
	return s.runBinaryContext(context.Background(), stdin, action)
}

func (s *shim) runBinaryContext(ctx context.Context, stdin io.Reader, action string) []byte {
	s.t.Helper()
	binary := filepath.Join(shimDir(s.t), "containerd-shim-vmrt-v2")
	if s.runtime != nil {
		binary = s.runtime.binary
	}
	cmd := exec.CommandContext(ctx, binary,
		"-namespace", namespace, "-id", s.id, "-address", filepath.Join(s.dir, "containerd.sock"),
		"-bundle", s.bundle, "-debug", action)
	cmd.Dir = s.bundle
	cmd.Env = append(os.Environ(), "TTRPC_ADDRESS="+filepath.Join(s.dir, "events.sock"), "VMRT_CONFIG="+s.config)
	cmd.Stdin = stdin
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		s.t.Fatalf("shim %s: %v: %s", action, err, stderr.Bytes())
	}
	if stderr.Len() > 0 && action == "start" {
		s.t.Errorf("shim start wrote to stderr: %s", stderr.Bytes())
	}
	return stdout.Bytes()
}

// openLog reads the shim's log FIFO, which is shown when the test fails.
func (s *shim) openLog() {
	path := filepath.Join(s.bundle, "log")
	if err := syscall.Mkfifo(path, 0o700); err != nil {
		s.t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(s.log, f)
	}()
	s.t.Cleanup(func() {
		f.Close()
		<-done
		if s.t.Failed() {
			s.t.Logf("shim's log:\n%s", s.log)
		}
	})
}

// shimLog is what a shim has logged.
type shimLog struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *shimLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *shimLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// end shuts the shim down and fails the test for anything that is left.
func (s *shim) end() {
	ctx, cancel := context.WithTimeout(s.ctx, callTimeout)
	defer cancel()
	pid := 0
	if c, err := s.task.Connect(ctx, &taskapi.ConnectRequest{ID: s.id}); err == nil {
		pid = int(c.ShimPid)
	}
	if pid != 0 {
		s.remove()
		s.task.Shutdown(ctx, &taskapi.ShutdownRequest{ID: s.id})
		s.waitGone(pid)
	}
	s.client.Close()
	s.checkLeftovers()
}

// remove kills and deletes the container, if there is one.
func (s *shim) remove() {
	ctx, cancel := context.WithTimeout(s.ctx, callTimeout)
	defer cancel()
	if _, err := s.task.State(ctx, &taskapi.StateRequest{ID: s.id}); err != nil {
		return
	}
	s.task.Kill(ctx, &taskapi.KillRequest{ID: s.id, Signal: uint32(syscall.SIGKILL), All: true})
	s.task.Wait(ctx, &taskapi.WaitRequest{ID: s.id})
	s.task.Delete(ctx, &taskapi.DeleteRequest{ID: s.id})
}

// waitGone waits for the end of a process that is not this one's child.
func (s *shim) waitGone(pid int) {
	s.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for running(pid) {
		if time.Now().After(deadline) {
			s.t.Errorf("shim %d still runs after Shutdown", pid)
			syscall.Kill(pid, syscall.SIGKILL)
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// running reports whether a process runs; one that has ended and that nobody
// has waited for does not.
func running(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	// proc(5): the state follows the command's name in parentheses.
	_, rest, _ := strings.Cut(string(b), ") ")
	return !strings.HasPrefix(rest, "Z") && !strings.HasPrefix(rest, "X")
}

// checkLeftovers fails the test if anything of the sandbox is left on the host.
func (s *shim) checkLeftovers() {
	s.t.Helper()
	if left, _ := filepath.Glob(filepath.Join(s.dir, "state", "*", "*")); len(left) > 0 {
		s.t.Errorf("state left behind: %v", left)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, s.dir) {
			s.t.Errorf("mount left behind: %s", line)
		}
	}
	filepath.WalkDir("/sys/fs/cgroup", func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.Contains(d.Name(), s.id) {
			s.t.Errorf("cgroup left behind: %s", path)
		}
		return nil
	})
	s.pids.mu.Lock()
	defer s.pids.mu.Unlock()
	for _, pid := range s.pids.all {
		if cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); running(int(pid)) {
			s.t.Errorf("process of a container left behind: %d, %q", pid, cmdline)
		}
	}
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		b, _ := os.ReadFile(p)
		if bytes.Contains(b, []byte(s.id)) {
			s.t.Errorf("process left behind: %s: %q", p, b)
		}
	}
}
