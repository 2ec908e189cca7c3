package agent_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmrt/vmrt/api"
)

// patience bounds what a test waits for; nothing waits that long when it works.
const patience = 60 * time.Second

// rootfs is the folder of the guest that containers run from.
const rootfs = "/rootfs"

// machine is something that an agent runs on.
type machine interface {
	// dial connects to a port of the agent.
	dial(ctx context.Context, port uint32) (net.Conn, error)
	// cgroups reports whether there are controllers to test.
	cgroups() bool
	// ownRuntime reports whether it is vmrt's crun that runs containers, not
	// that of this machine.
	ownRuntime() bool
}

// client is the host's side of an agent.
type client struct {
	machine
	agent api.AgentClient
	task  taskapi.TTRPCTaskService
}

// serial makes ids unique over all tests on a machine.
var serial atomic.Uint64

func unique(prefix string) string { return fmt.Sprintf("%s-%d", prefix, serial.Add(1)) }

func connect(t testing.TB, m machine) *client {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := m.dial(ctx, api.PortRPC)
	if err != nil {
		t.Fatal(err)
	}
	c := ttrpc.NewClient(conn)
	t.Cleanup(func() { c.Close() })
	return &client{machine: m, agent: api.NewAgentClient(c), task: taskapi.NewTTRPCTaskClient(c)}
}

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// halfCloser is a stream whose writing side ends alone.
type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// stream makes a stream and returns its URL.
func (c *client) stream(t testing.TB) (string, halfCloser) {
	t.Helper()
	conn, err := c.dial(testContext(t), api.PortStream)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	name := unique("stream")
	if err := api.WriteStreamHeader(conn, name); err != nil {
		t.Fatal(err)
	}
	var ack [1]byte
	if _, err := io.ReadFull(conn, ack[:]); err != nil || ack[0] != api.StreamAck {
		t.Fatalf("acknowledgement = %q, %v; want %q", ack, err, api.StreamAck)
	}
	return api.StreamURL(name), conn.(halfCloser)
}

// container is one container of a test.
type container struct {
	*client
	t    testing.TB
	id   string
	gone bool
}

// prepare makes the bundle of a container that runs args; with edits.
func (c *client) prepare(t testing.TB, args []string, edits ...func(*specs.Spec)) *container {
	t.Helper()
	ctr := &container{client: c, t: t, id: unique("c")}
	spec := baseSpec(ctr.id, args)
	for _, edit := range edits {
		edit(spec)
	}
	config, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	ctx := testContext(t)
	if _, err := c.agent.WriteBundle(ctx, &api.WriteBundleRequest{Id: ctr.id, Config: config}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ctr.remove)
	work := api.GuestRun + "/rw/" + ctr.id
	_, err = c.agent.Mount(ctx, &api.MountRequest{Mounts: []*api.MountSpec{
		{Type: "tmpfs", Source: "tmpfs", Target: work, Options: []string{"size=64m"}},
		{Type: "overlay", Source: "overlay", Target: ctr.rootfs(), Options: []string{
			"lowerdir=" + rootfs, "upperdir=" + work + "/upper", "workdir=" + work + "/work",
		}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if ctr.gone {
			return
		}
		if _, err := c.agent.Unmount(context.Background(), &api.UnmountRequest{Targets: []string{ctr.rootfs(), work}}); err != nil {
			t.Errorf("unmount the rootfs of %s: %v", ctr.id, err)
		}
	})
	return ctr
}

func (c *container) rootfs() string { return api.BundlePath(c.id) + "/rootfs" }

// forget is for a test that ends the machine: nothing is left to remove.
func (c *container) forget() { c.gone = true }

func (c *container) remove() {
	if c.gone {
		return
	}
	if _, err := c.agent.RemoveBundle(context.Background(), &api.RemoveBundleRequest{Id: c.id}); err != nil {
		c.t.Errorf("RemoveBundle(%s) = %v", c.id, err)
	}
}

func baseSpec(id string, args []string) *specs.Spec {
	caps := []string{"CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE"}
	return &specs.Spec{
		Version:  "1.0.2",
		Hostname: "guest",
		Root:     &specs.Root{Path: "rootfs"},
		Process: &specs.Process{
			Args: args, Cwd: "/", Env: []string{"PATH=/bin", "TERM=xterm"},
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"newinstance", "ptmxmode=0666", "mode=0620"}},
			{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=1777"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: "/vmrt/" + id,
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.MountNamespace},
				{Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
			},
		},
	}
}

func runcOptions() *anypb.Any {
	a, err := typeurl.MarshalAnyToProto(&options.Options{BinaryName: api.Runtime})
	if err != nil {
		panic(err)
	}
	return a
}

// stdio is the URLs of a process's streams and whether it has a terminal.
type streams struct {
	in, out, err string
	terminal     bool
}

func (c *container) create(s streams) error {
	_, err := c.task.Create(testContext(c.t), &taskapi.CreateTaskRequest{
		ID: c.id, Bundle: api.BundlePath(c.id), Options: runcOptions(),
		Stdin: s.in, Stdout: s.out, Stderr: s.err, Terminal: s.terminal,
	})
	if err == nil {
		c.t.Cleanup(c.destroy)
	}
	return err
}

func (c *container) mustCreate(s streams) {
	c.t.Helper()
	if err := c.create(s); err != nil {
		c.t.Fatalf("Create(%s) = %v", c.id, err)
	}
}

// destroy ends and deletes the container, if the test has not.
func (c *container) destroy() {
	ctx := testContext(c.t)
	if _, err := c.task.State(ctx, &taskapi.StateRequest{ID: c.id}); err != nil {
		return
	}
	c.task.Kill(ctx, &taskapi.KillRequest{ID: c.id, Signal: 9, All: true})
	c.task.Wait(ctx, &taskapi.WaitRequest{ID: c.id})
	if _, err := c.task.Delete(ctx, &taskapi.DeleteRequest{ID: c.id}); err != nil {
		c.t.Errorf("Delete(%s) = %v", c.id, err)
	}
}

func (c *container) start(exec string) {
	c.t.Helper()
	if _, err := c.task.Start(testContext(c.t), &taskapi.StartRequest{ID: c.id, ExecID: exec}); err != nil {
		c.t.Fatalf("Start(%s, %q) = %v", c.id, exec, err)
	}
}

func (c *container) wait(exec string) uint32 {
	c.t.Helper()
	r, err := c.task.Wait(testContext(c.t), &taskapi.WaitRequest{ID: c.id, ExecID: exec})
	if err != nil {
		c.t.Fatalf("Wait(%s, %q) = %v", c.id, exec, err)
	}
	return r.ExitStatus
}

func (c *container) delete(exec string) uint32 {
	c.t.Helper()
	r, err := c.task.Delete(testContext(c.t), &taskapi.DeleteRequest{ID: c.id, ExecID: exec})
	if err != nil {
		c.t.Fatalf("Delete(%s, %q) = %v", c.id, exec, err)
	}
	return r.ExitStatus
}

// exec adds a process and returns its id.
func (c *container) exec(s streams, args []string, edits ...func(*specs.Process)) string {
	c.t.Helper()
	p := baseSpec(c.id, args).Process
	p.Terminal = s.terminal
	for _, edit := range edits {
		edit(p)
	}
	b, err := json.Marshal(p)
	if err != nil {
		c.t.Fatal(err)
	}
	id := unique("e")
	_, err = c.task.Exec(testContext(c.t), &taskapi.ExecProcessRequest{
		ID: c.id, ExecID: id, Stdin: s.in, Stdout: s.out, Stderr: s.err, Terminal: s.terminal,
		Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: b},
	})
	if err != nil {
		c.t.Fatalf("Exec(%s, %v) = %v", c.id, args, err)
	}
	return id
}

// output runs args in the container and returns what it writes to stdout.
func (c *container) output(args ...string) (string, uint32) {
	c.t.Helper()
	url, conn := c.stream(c.t)
	id := c.exec(streams{out: url}, args)
	c.start(id)
	b, err := io.ReadAll(conn)
	if err != nil {
		c.t.Fatalf("output of %v: %v", args, err)
	}
	conn.Close()
	status := c.wait(id)
	c.delete(id)
	return string(b), status
}

// running returns a container whose init sleeps.
func (c *client) running(t testing.TB, edits ...func(*specs.Spec)) *container {
	t.Helper()
	ctr := c.prepare(t, []string{"sleep", "1000"}, edits...)
	ctr.mustCreate(streams{})
	ctr.start("")
	return ctr
}

// events subscribes to the guest's events. They are received at once: ttrpc
// drops what a client leaves for longer than a second.
func (c *client) events(t testing.TB) <-chan *api.Event {
	t.Helper()
	stream, err := c.agent.Events(testContext(t), &api.Empty{})
	if err != nil {
		t.Fatal(err)
	}
	events := make(chan *api.Event, 1<<16)
	go func() {
		defer close(events)
		for {
			e, err := stream.Recv()
			if err != nil {
				return
			}
			events <- e
		}
	}()
	return events
}

// needRoot skips a test that cannot run otherwise.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
}
