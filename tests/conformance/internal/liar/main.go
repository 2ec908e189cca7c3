// Command liar is an agent that an attacker has taken over, as the only program
// of a virtual machine. It says hello as the agent does, answers what it is
// asked, and then does what the file /mode says:
//
//	events   sends events without end, true and untrue
//	deaf     reads no requests once a container has started
//	giant    answers Stats with megabytes
//	errors   answers Pause with an error that is long and full of control characters
//	silent   tells nobody that SIGKILL has ended a container
//	flood    connects to the host without end and sends all that each connection takes
//	quiet    nothing of that
//
// Containers are made up; SIGKILL ends them.
package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	eventstypes "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmrt/vmrt/api"
)

func main() {
	fmt.Println("liar:", run())
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	if err := os.MkdirAll("/proc", 0o755); err != nil {
		return err
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	mode, err := os.ReadFile("/mode")
	if err != nil {
		return err
	}
	port, err := hostPort()
	if err != nil {
		return err
	}
	l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, api.PortRPC, nil)
	if err != nil {
		return err
	}
	host, err := vsock.Dial(vsock.Host, port, nil)
	if err != nil {
		return err
	}
	if err := api.WriteMessage(host, &api.Hello{Protocol: api.ProtocolVersion, Version: "liar"}); err != nil {
		return err
	}
	if err := api.ReadMessage(host, &api.Welcome{}); err != nil {
		return err
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	t := &tasks{mode: string(mode), port: port, killed: make(chan string, 16)}
	taskapi.RegisterTTRPCTaskService(server, t)
	api.RegisterAgentService(server, &agent{tasks: t})
	return server.Serve(context.Background(), listener{l, t})
}

// hostPort is what the kernel was told.
func hostPort() (uint32, error) {
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return 0, err
	}
	for arg := range strings.FieldsSeq(string(b)) {
		if v, ok := strings.CutPrefix(arg, api.CmdlinePort+"="); ok {
			n, err := strconv.ParseUint(v, 10, 32)
			return uint32(n), err
		}
	}
	return api.HostPort, nil
}

// listener makes connections that can go deaf.
type listener struct {
	net.Listener
	t *tasks
}

func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return conn{c, l.t}, err
}

type conn struct {
	net.Conn
	t *tasks
}

func (c conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.t.deaf.Load() {
		select {}
	}
	return n, err
}

// tasks makes containers up.
type tasks struct {
	taskapi.TTRPCTaskService
	mode   string
	port   uint32      // the host's
	killed chan string // containers that have not been reported
	deaf   atomic.Bool

	mu sync.Mutex
	id string // guarded by mu; of the last container
}

var empty = &emptypb.Empty{}

func (t *tasks) Create(_ context.Context, r *taskapi.CreateTaskRequest) (*taskapi.CreateTaskResponse, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.id = r.ID
	return &taskapi.CreateTaskResponse{Pid: 1 << 31}, nil
}

func (t *tasks) Start(context.Context, *taskapi.StartRequest) (*taskapi.StartResponse, error) {
	t.deaf.Store(t.mode == "deaf")
	if t.mode == "flood" {
		for range 8 {
			go flood(t.port)
		}
	}
	return &taskapi.StartResponse{Pid: 1 << 31}, nil
}

// flood leaves every connection that the host takes open.
func flood(port uint32) {
	for {
		c, err := vsock.Dial(vsock.Host, port, nil)
		if err == nil {
			go c.Write(make([]byte, 1<<20))
		}
	}
}

func (t *tasks) Kill(_ context.Context, r *taskapi.KillRequest) (*emptypb.Empty, error) {
	if t.mode != "silent" {
		t.killed <- r.ID
	}
	return empty, nil
}

func (t *tasks) Delete(context.Context, *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	return &taskapi.DeleteResponse{}, nil
}

func (t *tasks) Pause(context.Context, *taskapi.PauseRequest) (*emptypb.Empty, error) {
	if t.mode != "errors" {
		return empty, nil
	}
	return nil, status.Error(codes.Internal, "freeze: "+strings.Repeat("\x1b]0;owned\x07", 20000))
}

func (t *tasks) Stats(context.Context, *taskapi.StatsRequest) (*taskapi.StatsResponse, error) {
	size := 0
	if t.mode == "giant" {
		size = 3 << 20
	}
	return &taskapi.StatsResponse{Stats: &anypb.Any{TypeUrl: "io.containerd.cgroups.v2.Metrics", Value: bytes.Repeat([]byte{0xff}, size)}}, nil
}

// agent does nothing, successfully.
type agent struct {
	api.AgentService
	tasks *tasks
}

var none = &api.Empty{}

func (*agent) Clock(context.Context, *api.ClockRequest) (*api.ClockResponse, error) {
	return &api.ClockResponse{}, nil // 1970
}
func (*agent) Mount(context.Context, *api.MountRequest) (*api.Empty, error) { return none, nil }
func (*agent) WriteBundle(context.Context, *api.WriteBundleRequest) (*api.Empty, error) {
	return none, nil
}
func (*agent) RemoveBundle(context.Context, *api.RemoveBundleRequest) (*api.Empty, error) {
	return none, nil
}
func (*agent) Devices(context.Context, *api.Empty) (*api.DevicesResponse, error) {
	return &api.DevicesResponse{Devices: []*api.Device{nil, {}, {Path: "/dev/\x1b[2J", Type: "c", Major: -1}}}, nil
}
func (*agent) OnlineCPUs(context.Context, *api.OnlineCPUsRequest) (*api.Empty, error) {
	return none, nil
}
func (*agent) ConfigureNetwork(context.Context, *api.NetworkConfig) (*api.Empty, error) {
	return none, nil
}

// Events tells of containers' ends and, if that is the mode, of anything else.
func (a *agent) Events(ctx context.Context, _ *api.Empty, stream api.Agent_EventsServer) error {
	var seq uint64
	for {
		var lies []any
		if a.tasks.mode == "events" {
			a.tasks.mu.Lock()
			id := a.tasks.id
			a.tasks.mu.Unlock()
			lies = []any{
				&eventstypes.TaskOOM{ContainerID: id}, &eventstypes.TaskStart{ContainerID: id}, &eventstypes.TaskStart{ContainerID: "other"},
				&eventstypes.TaskExit{ContainerID: id, ID: "other"}, &eventstypes.TaskDelete{ContainerID: id}, &eventstypes.ContainerDelete{ID: id},
			}
		}
		select {
		case id := <-a.tasks.killed:
			lies = append(lies, &eventstypes.TaskExit{ContainerID: id, ID: id, ExitStatus: 137}, &eventstypes.TaskExit{ContainerID: id, ID: id, ExitStatus: 1})
		case <-ctx.Done():
			return ctx.Err()
		default:
			if len(lies) == 0 {
				// Nothing to lie about: wait.
				select {
				case id := <-a.tasks.killed:
					lies = append(lies, &eventstypes.TaskExit{ContainerID: id, ID: id, ExitStatus: 137})
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		}
		for _, lie := range lies {
			encoded, err := typeurl.MarshalAnyToProto(lie)
			if err != nil {
				return err
			}
			seq++
			if err := stream.Send(&api.Event{Seq: seq, Topic: strings.Repeat("\x1b", 1000), Event: encoded}); err != nil {
				return err
			}
		}
	}
}
