package shim

import (
	"bytes"
	"context"
	"net"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/loglimit"
	"github.com/vmrt/vmrt/pkg/stdio"
)

// published is a containerd that takes events, one after the other, once it is
// let to.
type published struct {
	release chan struct{}
	called  chan struct{} // gets a value when there is a first event

	mu     sync.Mutex
	topics []string
}

func (p *published) Publish(_ context.Context, topic string, _ events.Event) error {
	select {
	case p.called <- struct{}{}:
	default:
	}
	<-p.release
	p.mu.Lock()
	defer p.mu.Unlock()
	p.topics = append(p.topics, topic)
	return nil
}

// guestService is a service with a container "c" that has an exec "e". The
// guest was told of both.
func guestService(t *testing.T) (*service, *container, *published) {
	t.Helper()
	p := &published{release: make(chan struct{}), called: make(chan struct{}, 1)}
	s := &service{ctx: t.Context(), namespace: "test", events: newEventQueue(t.Context(), p), containers: map[string]*container{}}
	c := &container{
		id: "c", spec: &specs.Spec{}, execs: map[string]*process{}, lastPid: 42,
		init: newProcess("", stdio.Config{ID: "c"}),
	}
	c.execs["e"] = newProcess("e", stdio.Config{ID: "c"})
	for _, p := range c.processes() {
		p.setState(statusCreated)
		p.enterGuest()
	}
	s.containers[c.id] = c
	return s, c, p
}

// send has the guest send an event n times.
func send(t *testing.T, s *service, n int, event any) {
	t.Helper()
	encoded, err := typeurl.MarshalAnyToProto(event)
	if err != nil {
		t.Fatal(err)
	}
	for range n {
		s.guestEvent(t.Context(), &api.Event{Event: encoded})
	}
}

// all waits for everything that was sent to be published.
func (p *published) all(t *testing.T, s *service) []string {
	t.Helper()
	close(p.release)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := s.events.close(ctx); err != nil {
		t.Fatal(err)
	}
	return p.topics
}

// A guest that repeats itself while containerd is away costs no memory and is
// heard once.
func TestGuestRepeatsEvents(t *testing.T) {
	s, c, p := guestService(t)
	for _, p := range c.processes() {
		if err := p.beginStart(statusCreated); err != nil {
			t.Fatal(err)
		}
	}
	const n = 10000
	send(t, s, n, &eventstypes.TaskStart{ContainerID: "c", Pid: 7})
	send(t, s, n, &eventstypes.TaskExecStarted{ContainerID: "c", ExecID: "e", Pid: 8})
	send(t, s, n, &eventstypes.TaskOOM{ContainerID: "c"})
	send(t, s, n, &eventstypes.TaskExit{ContainerID: "c", ID: "e", ExitStatus: 3})
	send(t, s, n, &eventstypes.TaskExit{ContainerID: "c", ID: "c", ExitStatus: 4})
	send(t, s, n, &eventstypes.TaskStart{ContainerID: "c"})
	got := p.all(t, s)
	want := []string{"/tasks/start", "/tasks/exec-started", "/tasks/oom", "/tasks/exit", "/tasks/exit"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("published events (-want +got):\n%s", diff)
	}
	if _, status, _ := c.execs["e"].snapshot(); status != 3 {
		t.Errorf("exit status of the exec = %d; want 3", status)
	}
}

// A guest cannot tell of what the host has not asked it for.
func TestGuestInventsEvents(t *testing.T) {
	s, c, p := guestService(t)
	untold := &container{id: "untold", spec: &specs.Spec{}, execs: map[string]*process{}, init: newProcess("", stdio.Config{ID: "untold"})}
	s.containers["untold"] = untold
	for _, event := range []any{
		&eventstypes.TaskStart{ContainerID: "c"}, // nobody has started it
		&eventstypes.TaskExecStarted{ContainerID: "c", ExecID: "e"},
		&eventstypes.TaskExecStarted{ContainerID: "c", ExecID: "other"},
		&eventstypes.TaskStart{ContainerID: "untold"},
		&eventstypes.TaskOOM{ContainerID: "untold"},
		&eventstypes.TaskExit{ContainerID: "untold", ID: "untold"},
		&eventstypes.TaskExit{ContainerID: "c", ID: "other"},
		&eventstypes.TaskExit{ContainerID: "other", ID: "other"},
		&eventstypes.TaskDelete{ContainerID: "c"},
		&eventstypes.ContainerDelete{ID: "c"},
		&specs.Spec{},
	} {
		send(t, s, 1, event)
	}
	for _, ev := range []*api.Event{nil, {}, {Event: &anypb.Any{TypeUrl: "x"}}, {Event: &anypb.Any{TypeUrl: "containerd.events.TaskExit", Value: []byte{0xff}}}} {
		s.guestEvent(t.Context(), ev)
	}
	if got := p.all(t, s); len(got) != 0 {
		t.Errorf("published events = %v; want none", got)
	}
	if state, _, _ := untold.init.snapshot(); state != 0 {
		t.Errorf("state of a container that the guest was not told of = %v; want unknown", state)
	}
	if state, _, _ := c.init.snapshot(); state != statusCreated {
		t.Errorf("state = %v; want created", state)
	}
}

// guestConn is a stream of the guest's.
type guestConn struct{ net.Conn }

func (guestConn) CloseWrite() error { return nil }

// The exit of an init waits for its output, once, however often the guest
// tells of it.
func TestGuestRepeatsExitOfLogged(t *testing.T) {
	s, c, p := guestService(t)
	path := filepath.Join(t.TempDir(), "log")
	io, err := stdio.Open(t.Context(), stdio.Config{ID: "c", Stdout: "file://" + path, Stderr: "file://" + path})
	if err != nil {
		t.Fatal(err)
	}
	host, guest := net.Pipe() // which the guest never ends
	io.Attach(nil, guestConn{host}, nil)
	c.init = newProcess("", stdio.Config{ID: "c", Stdout: "binary:///logger"})
	c.init.setState(statusRunning)
	c.init.enterGuest()
	c.init.setIO(io)
	before := runtime.NumGoroutine()
	send(t, s, 1000, &eventstypes.TaskExit{ContainerID: "c", ID: "c", ExitStatus: 5})
	if more := runtime.NumGoroutine() - before; more > 10 {
		t.Errorf("1000 exits of one process made %d goroutines; want one", more)
	}
	guest.Close()
	if err := io.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := c.init.wait(ctx); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.called: // who waits is told first
	case <-ctx.Done():
		t.Fatal("the exit is not published")
	}
	if diff := cmp.Diff([]string{"/tasks/exit"}, p.all(t, s)); diff != "" {
		t.Errorf("published events (-want +got):\n%s", diff)
	}
}

func TestTakeOOM(t *testing.T) {
	c := &container{}
	now := time.Now()
	for _, tt := range []struct {
		after time.Duration
		want  bool
	}{{0, true}, {oomInterval / 2, false}, {oomInterval, true}, {oomInterval * 3 / 2, false}, {3 * oomInterval, true}} {
		if got := c.takeOOM(now.Add(tt.after)); got != tt.want {
			t.Errorf("takeOOM() %v after the first = %t; want %t", tt.after, got, tt.want)
		}
	}
}

func (p *published) Close() error { return nil }

// What a guest can have the shim log is bounded.
func TestLogIsBounded(t *testing.T) {
	logger := log.L.Logger
	before := logger.Out
	defer logger.SetOutput(before)
	var out bytes.Buffer
	logger.SetOutput(&out)
	ctx, sd := shutdown.WithShutdown(namespaces.WithNamespace(t.Context(), "test"))
	s, err := newService(ctx, &published{}, sd, "")
	if err != nil {
		t.Fatal(err)
	}
	send(t, s, 50000, &eventstypes.ContainerDelete{ID: "c"})
	if out.Len() == 0 || out.Len() > 2*loglimit.Burst {
		t.Errorf("50000 odd events made %d bytes of log; want some, and at most %d", out.Len(), 2*loglimit.Burst)
	}
}
