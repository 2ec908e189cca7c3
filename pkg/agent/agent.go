// Package agent is the guest's side of a pod: PID 1 of the virtual machine.
// It boots the guest, tells the host that it is ready, and serves
// vmrt.agent.v1 and containerd.task.v3 over vsock until the host shuts the
// machine down or is gone.
//
// The agent holds mechanism only; what to mount, run and correct is the
// host's decision. Requests of any number of connections run concurrently.
// A request that panics is answered with an error; a panic anywhere else ends
// the machine, with its trace on the console.
//
// Not guaranteed: that anything of the guest survives the end of the host's
// connection.
package agent

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"

	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/task"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/pkg/sys/reaper"
	runc "github.com/containerd/go-runc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/agent/boot"
	"github.com/vmrt/vmrt/pkg/agent/events"
	"github.com/vmrt/vmrt/pkg/agent/halt"
	"github.com/vmrt/vmrt/pkg/agent/pod"
	"github.com/vmrt/vmrt/pkg/agent/stdio"
	guesttask "github.com/vmrt/vmrt/pkg/agent/task"
	"github.com/vmrt/vmrt/pkg/agent/userns"
	"github.com/vmrt/vmrt/pkg/dial"
	"github.com/vmrt/vmrt/pkg/idmap"
)

// The collector runs often rather than letting the heap of an idle pod's
// agent grow: memory is what a pod costs.
const (
	gcPercent   = 50
	memoryLimit = 64 << 20 // bytes; a target, not a bound
)

// processors is what Go code runs on at once. With one, every system call that
// takes a while has the runtime start another thread; more are of no use.
const processors = 2

// fifos is where the FIFOs of stdio are.
const fifos = api.GuestRun + "/io"

// Run is the life of PID 1. version names the build in the handshake. It
// returns only with an error, and the machine is useless then.
func Run(version string) error {
	var phases boot.Phases
	phases.Mark("start")
	podInit, err := userns.Init()
	if err != nil {
		return err
	}
	if podInit == nil {
		if err := boot.Early(&phases); err != nil {
			return fmt.Errorf("boot: %w", err)
		}
	}
	cmdline, err := boot.ReadCmdline()
	if err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	if podInit == nil && !cmdline.IDs.IsZero() {
		return userns.Enter(cmdline.IDs) // which begins anew
	}
	listening, err := listen(api.PortRPC, api.PortStream, api.PortDial)
	if err != nil {
		return err
	}
	phases.Mark("listening")
	hostFD, err := dialHost(cmdline.Port)
	if err != nil {
		return err
	}
	phases.Mark("dialled")
	if err := sayHello(hostFD, version); err != nil {
		return err
	}
	phases.Mark("hello")

	// What follows runs beside the host's own preparations.
	if err := boot.SetEnvironment(); err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	runtime.GOMAXPROCS(processors)
	debug.SetGCPercent(gcPercent)
	debug.SetMemoryLimit(memoryLimit)
	setLogLevel(cmdline.Debug)
	reaped := reap()
	booted := make(chan struct{})
	a, err := newAgent(cmdline.Port, cmdline.IDs, podInit, booted, func() { halt.PowerOff(reaped) })
	if err != nil {
		return err
	}
	host, err := pollable(hostFD)
	if err != nil {
		return err
	}
	if err := readWelcome(host); err != nil {
		return err
	}
	listeners, err := accepting(listening)
	if err != nil {
		return err
	}
	failed := a.serve(listeners[0], listeners[1], listeners[2])
	phases.Mark("serving")
	if err := boot.Late(&phases); err != nil {
		log.L.WithError(err).Error("boot")
	}
	close(booted)
	followHostClock()
	if cmdline.Debug {
		phases.WriteTo(os.Stderr)
	}
	select {
	case err := <-failed:
		return err
	case err := <-hostGone(host):
		log.L.WithError(err).Warn("the host is gone")
		halt.PowerOff(reaped)
		return nil
	}
}

func setLogLevel(debugging bool) {
	level := "warn"
	if debugging {
		level = "debug"
	}
	if err := log.SetLevel(level); err != nil {
		log.L.WithError(err).Error("set log level")
	}
}

// reap makes PID 1 collect every process that ends. The channel has a value
// whenever some were.
func reap() <-chan struct{} {
	signals := make(chan os.Signal, 32)
	signal.Notify(signals, unix.SIGCHLD)
	reaped := make(chan struct{}, 1)
	go func() {
		for range signals {
			if err := reaper.Reap(); err != nil {
				log.L.WithError(err).Error("reap processes")
			}
			select {
			case reaped <- struct{}{}:
			default:
			}
		}
	}()
	return reaped
}

// agent is what serves requests.
type agent struct {
	rpc     *ttrpc.Server
	streams *stdio.Registry
	dials   *dial.Server
}

// newAgent starts the task service. hostPort is where the host listens, ids and
// podInit are for pod.New. Containers are created after booted.
func newAgent(hostPort uint32, ids idmap.Mapping, podInit *os.Process, booted <-chan struct{}, powerOff func()) (*agent, error) {
	if err := os.MkdirAll(fifos, 0o700); err != nil {
		return nil, err
	}
	streams := stdio.NewRegistry(stdio.DefaultLimits())
	var wrapped *guesttask.Service
	queue := events.New(func(container, process string) { wrapped.Exited(container, process) })
	ctx, sd := shutdown.WithShutdown(context.Background()) // never shut down: Shutdown is not forwarded
	inner, err := task.NewTaskService(ctx, queue, sd)
	if err != nil {
		return nil, fmt.Errorf("task service: %w", err)
	}
	wrapped = guesttask.New(inner, streams, fifos)
	uid, gid := ids.Root()
	runc.Monitor = guesttask.NewMonitor(reaper.Default, wrapped, uid, gid)
	server, err := ttrpc.NewServer(ttrpc.WithChainUnaryServerInterceptor(recoverPanic, createAfter(booted)))
	if err != nil {
		return nil, err
	}
	taskapi.RegisterTTRPCTaskService(server, wrapped)
	api.RegisterAgentService(server, &service{
		events: queue, pod: pod.New(ids, podInit), powerOff: powerOff, hostPort: hostPort, names: newNames(hostPort), booted: booted,
	})
	return &agent{rpc: server, streams: streams, dials: dial.NewServer(dial.Limits())}, nil
}

// serve starts to serve all ports. The channel has the first failure.
func (a *agent) serve(rpc, streams, dials net.Listener) <-chan error {
	failed := make(chan error, 3)
	go func() { failed <- fmt.Errorf("serve requests: %w", a.rpc.Serve(context.Background(), rpc)) }()
	go func() { failed <- fmt.Errorf("serve streams: %w", a.streams.Serve(streams)) }()
	go func() { failed <- fmt.Errorf("serve dials: %w", a.dials.Serve(dials)) }()
	return failed
}
