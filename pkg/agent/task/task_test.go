package task

import (
	"context"
	"errors"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	runc "github.com/containerd/go-runc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/agent/stdio"
)

const patience = 20 * time.Second

// inner is a task service that makes processes by the monitor, as containerd's
// does, but without containers: each runs a shell command.
type inner struct {
	taskapi.TTRPCTaskService // what is not here panics
	monitor                  *Monitor
	script                   string
	fail                     error // of Create and Start

	mu     sync.Mutex
	calls  []string
	cmds   map[key]*exec.Cmd
	status task.Status
}

func (i *inner) note(ctx context.Context, call string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if ns, _ := namespaces.Namespace(ctx); ns != Namespace {
		call += " in namespace " + ns
	}
	i.calls = append(i.calls, call)
}

func (i *inner) run(k key, args ...string) error {
	if i.fail != nil {
		return i.fail
	}
	// The shell ignores what the monitor goes by.
	cmd := exec.Command("/bin/sh", append([]string{"-c", i.script}, append(args, k.id)...)...)
	if _, err := i.monitor.Start(cmd); err != nil {
		return err
	}
	i.mu.Lock()
	i.cmds[k] = cmd
	i.mu.Unlock()
	return nil
}

func (i *inner) Create(ctx context.Context, r *taskapi.CreateTaskRequest) (*taskapi.CreateTaskResponse, error) {
	i.note(ctx, "create")
	if err := i.run(key{id: r.ID}, "create", "--bundle", r.Bundle, "--pid-file", r.Bundle+"/init.pid"); err != nil {
		return nil, err
	}
	return &taskapi.CreateTaskResponse{Pid: 2}, nil
}

func (i *inner) Exec(ctx context.Context, r *taskapi.ExecProcessRequest) (*emptypb.Empty, error) {
	i.note(ctx, "exec")
	return &emptypb.Empty{}, nil
}

func (i *inner) Start(ctx context.Context, r *taskapi.StartRequest) (*taskapi.StartResponse, error) {
	i.note(ctx, "start")
	if r.ExecID == "" {
		return &taskapi.StartResponse{}, nil
	}
	return &taskapi.StartResponse{}, i.run(key{r.ID, r.ExecID}, "exec", "--process", "x", "--pid-file", api.BundlePath(r.ID)+"/"+r.ExecID+".pid")
}

func (i *inner) State(context.Context, *taskapi.StateRequest) (*taskapi.StateResponse, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return &taskapi.StateResponse{Status: i.status, Stdout: "/run/vmrt/io/1"}, nil
}

func (i *inner) Delete(ctx context.Context, r *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	i.note(ctx, "delete")
	return &taskapi.DeleteResponse{}, nil
}

func (i *inner) wait(k key) {
	i.mu.Lock()
	cmd := i.cmds[k]
	i.mu.Unlock()
	cmd.Wait()
	i.mu.Lock()
	i.status = task.Status_STOPPED
	i.mu.Unlock()
}

// plain starts commands without a reaper.
type plain struct{ runc.ProcessMonitor }

func (plain) Start(c *exec.Cmd) (chan runc.Exit, error) { return nil, c.Start() }

// bench is a Service over inner, with a registry that can be dialled.
type bench struct {
	*Service
	inner *inner
	addr  string
}

func newBench(t *testing.T, script string) *bench {
	t.Helper()
	dir := t.TempDir()
	b := &bench{addr: filepath.Join(dir, "s"), inner: &inner{script: script, cmds: make(map[key]*exec.Cmd)}}
	l, err := net.Listen("unix", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	registry := stdio.NewRegistry(stdio.DefaultLimits())
	go registry.Serve(l)
	t.Cleanup(func() { l.Close(); registry.Close() })
	b.Service = New(b.inner, registry, dir)
	b.inner.monitor = NewMonitor(plain{}, b.Service, 0, 0)
	return b
}

func (b *bench) dial(t *testing.T, name string) *net.UnixConn {
	t.Helper()
	c, err := net.Dial("unix", b.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	if err := api.WriteStreamHeader(c, name); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	return c.(*net.UnixConn)
}

func createRequest(t *testing.T, id string) *taskapi.CreateTaskRequest {
	t.Helper()
	o, err := typeurl.MarshalAnyToProto(&options.Options{BinaryName: api.Runtime})
	if err != nil {
		t.Fatal(err)
	}
	return &taskapi.CreateTaskRequest{ID: id, Bundle: api.BundlePath(id), Options: o}
}

func (b *bench) create(t *testing.T, edit func(*taskapi.CreateTaskRequest)) error {
	t.Helper()
	r := createRequest(t, "c")
	edit(r)
	_, err := b.Create(t.Context(), r)
	return err
}

func TestProcessGetsItsPipes(t *testing.T) {
	b := newBench(t, "cat; echo error >&2")
	in, out, errs := b.dial(t, "in"), b.dial(t, "out"), b.dial(t, "err")
	err := b.create(t, func(r *taskapi.CreateTaskRequest) {
		r.Stdin, r.Stdout, r.Stderr = api.StreamURL("in"), api.StreamURL("out"), api.StreamURL("err")
	})
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(in, "echo")
	in.CloseWrite()
	for want, c := range map[string]io.Reader{"echo": out, "error\n": errs} {
		if got, err := io.ReadAll(c); string(got) != want || err != nil {
			t.Errorf("stream = %q, %v; want %q", got, err, want)
		}
	}
	b.inner.wait(key{id: "c"})
}

func TestMissingStreamsAreNull(t *testing.T) {
	b := newBench(t, "cat; echo lost || exit 3; echo kept >&2")
	errs := b.dial(t, "err")
	if err := b.create(t, func(r *taskapi.CreateTaskRequest) { r.Stderr = api.StreamURL("err") }); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(errs); string(got) != "kept\n" || err != nil {
		t.Errorf("stderr = %q, %v; want kept", got, err)
	}
	b.inner.wait(key{id: "c"})
}

func TestStateHasTheRequestsStreams(t *testing.T) {
	b := newBench(t, "true")
	b.dial(t, "out")
	if err := b.create(t, func(r *taskapi.CreateTaskRequest) { r.Stdout = api.StreamURL("out") }); err != nil {
		t.Fatal(err)
	}
	st, err := b.State(t.Context(), &taskapi.StateRequest{ID: "c"})
	if err != nil || st.Stdout != api.StreamURL("out") || st.Stderr != "" {
		t.Errorf("State() = %v, %v; want stdout %s", st, err, api.StreamURL("out"))
	}
	b.inner.wait(key{id: "c"})
}

func TestCreateFailureClosesStreams(t *testing.T) {
	b := newBench(t, "true")
	b.inner.fail = errors.New("no")
	out := b.dial(t, "out")
	if err := b.create(t, func(r *taskapi.CreateTaskRequest) { r.Stdout = api.StreamURL("out") }); err == nil {
		t.Fatal("Create() = nil; want an error")
	}
	if _, err := out.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("read from the stream = %v; want EOF", err)
	}
	// The id is free again.
	b.inner.fail = nil
	if err := b.create(t, func(*taskapi.CreateTaskRequest) {}); err != nil {
		t.Errorf("Create() after a failed one = %v", err)
	}
	b.inner.wait(key{id: "c"})
}

func TestExecStartsOnce(t *testing.T) {
	b := newBench(t, "true")
	if err := b.create(t, func(*taskapi.CreateTaskRequest) {}); err != nil {
		t.Fatal(err)
	}
	b.inner.wait(key{id: "c"})
	_, err := b.Exec(t.Context(), &taskapi.ExecProcessRequest{ID: "c", ExecID: "e", Spec: &anypb.Any{Value: []byte("{}")}})
	if err != nil {
		t.Fatal(err)
	}
	b.inner.fail = errors.New("no such program")
	start := func() error {
		_, err := b.Start(t.Context(), &taskapi.StartRequest{ID: "c", ExecID: "e"})
		return errgrpc.ToNative(err)
	}
	if err := start(); err == nil || errdefs.IsFailedPrecondition(err) {
		t.Errorf("first Start() = %v; want the service's error", err)
	}
	if err := start(); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("second Start() = %v; want a failed precondition", err)
	}
}

// Delete must come after the exit's event and the last of the output.
func TestDeleteWaits(t *testing.T) {
	b := newBench(t, "echo out")
	out := b.dial(t, "out")
	if err := b.create(t, func(r *taskapi.CreateTaskRequest) { r.Stdout = api.StreamURL("out") }); err != nil {
		t.Fatal(err)
	}
	b.inner.wait(key{id: "c"})
	published := make(chan struct{})
	go func() {
		close(published)
		b.Exited("c", "c")
	}()
	if _, err := b.Delete(t.Context(), &taskapi.DeleteRequest{ID: "c"}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-published:
	default:
		t.Error("Delete() returned before the exit was published")
	}
	if got, err := io.ReadAll(out); string(got) != "out\n" || err != nil {
		t.Errorf("stdout = %q, %v; want out", got, err)
	}
}

func TestShutdownIsNotForwarded(t *testing.T) {
	b := newBench(t, "true")
	if _, err := b.Shutdown(t.Context(), &taskapi.ShutdownRequest{}); err != nil {
		t.Errorf("Shutdown() = %v; want nil", err)
	}
	if len(b.inner.calls) > 0 {
		t.Errorf("calls of the service = %v; want none", b.inner.calls)
	}
}

func TestNamespace(t *testing.T) {
	b := newBench(t, "true")
	if err := b.create(t, func(*taskapi.CreateTaskRequest) {}); err != nil {
		t.Fatal(err)
	}
	b.inner.wait(key{id: "c"})
	if len(b.inner.calls) != 1 || b.inner.calls[0] != "create" {
		t.Errorf("calls of the service = %v; want create in namespace %s", b.inner.calls, Namespace)
	}
}

func TestCommandProcess(t *testing.T) {
	create := []string{"/bin/crun", "--root", "/run/x", "create", "--bundle", "/run/vmrt/bundles/a", "--pid-file", "/run/vmrt/bundles/a/init.pid", "a"}
	execs := []string{"/bin/crun", "exec", "--process", "/tmp/p", "--detach", "--pid-file", "/run/vmrt/bundles/a/init.pid", "a"}
	for _, tt := range []struct {
		name string
		args []string
		want key
		ok   bool
	}{
		{"create", create, key{id: "a"}, true},
		{"exec called init", execs, key{"a", "init"}, true},
		{"start", []string{"/bin/crun", "start", "a"}, key{}, false},
		{"kill of a container called exec", []string{"/bin/crun", "kill", "exec", "9"}, key{}, false},
		{"another bundle", append(create[:len(create)-1:len(create)-1], "b"), key{}, false},
		{"nothing", nil, key{}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got, ok := commandProcess(tt.args); got != tt.want || ok != tt.ok {
				t.Errorf("commandProcess(%q) = %v, %v; want %v, %v", tt.args, got, ok, tt.want, tt.ok)
			}
		})
	}
}
