// Package task serves containerd.task.v3 in the guest: containerd's own runc
// task service behind a wrapper that keeps a request from harming the agent.
//
// The wrapper checks identifiers, bundles, options and stdio before the
// service sees them, joins stdio to stream connections (pkg/agent/stdio), and
// never forwards Shutdown, after which the service would drop every event. It
// adds nothing to what a container is. A process without a terminal gets pipes
// of its own (Monitor), so the service copies only terminals.
//
// Stdin of a process that has a stream ends with the stream's half-close;
// CloseIO for it is accepted and does nothing, so that it cannot overtake
// bytes that are still on their way.
//
// Not guaranteed: that a panic inside the service leaves it usable. The known
// causes are refused as invalid arguments.
package task

import (
	"context"
	"fmt"
	"sync"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmrt/vmrt/pkg/agent/stdio"
)

// Namespace is the containerd namespace that the task service works in. Only
// the name of the OCI runtime's state folder depends on it.
const Namespace = "vmrt"

// key names a process: exec is empty for a container's init.
type key struct{ id, exec string }

// process is what the wrapper knows of one process.
type process struct {
	stdio    *stdio.Process
	urls     stdio.URLs
	terminal bool
	publish  func()        // notes that the exit was published
	exited   chan struct{} // closed by publish
	started  bool          // an exec that Start was called for; guarded by Service.mu
	failed   bool          // an exec whose Start failed; guarded by Service.mu
}

// Service is a containerd.task.v3. Its methods may be called concurrently.
type Service struct {
	inner   taskapi.TTRPCTaskService
	streams *stdio.Registry
	fifos   string

	mu        sync.Mutex
	processes map[key]*process
}

var _ taskapi.TTRPCTaskService = (*Service)(nil)

// New wraps inner. FIFOs are made in the folder fifos, connections are taken
// from streams.
func New(inner taskapi.TTRPCTaskService, streams *stdio.Registry, fifos string) *Service {
	return &Service{inner: inner, streams: streams, fifos: fifos, processes: make(map[key]*process)}
}

// Exited must be called when the exit of a process was published. process
// is the exec id, or the container's id for its init.
func (s *Service) Exited(container, process string) {
	k := key{container, process}
	if process == container {
		k.exec = ""
	}
	s.mu.Lock()
	p := s.processes[k]
	s.mu.Unlock()
	if p == nil {
		return
	}
	p.publish()
	if p.terminal && p.urls.Stdin != "" {
		// With a terminal nobody else closes the service's end.
		go s.closeStdin(k)
	}
}

// closeStdin makes the service close its write end of a process's stdin.
func (s *Service) closeStdin(k key) {
	_, err := s.inner.CloseIO(inNamespace(context.Background()),
		&taskapi.CloseIORequest{ID: k.id, ExecID: k.exec, Stdin: true})
	if err != nil {
		log.L.WithError(err).Debugf("close stdin of %s %s", k.id, k.exec)
	}
}

// add records a process and opens its stdio. The caller must have it removed
// again, by drop or by Delete.
func (s *Service) add(k key, urls stdio.URLs, terminal bool) (*process, error) {
	p := &process{urls: urls, terminal: terminal, exited: make(chan struct{})}
	p.publish = sync.OnceFunc(func() { close(p.exited) })
	s.mu.Lock()
	_, exists := s.processes[k]
	if !exists {
		s.processes[k] = p
	}
	s.mu.Unlock()
	if exists {
		return nil, fmt.Errorf("%s: %w", k, errdefs.ErrAlreadyExists)
	}
	opened, err := s.streams.Open(s.fifos, urls, terminal)
	if err != nil {
		s.forget(k)
		return nil, fmt.Errorf("stdio of %s: %w", k, err)
	}
	s.mu.Lock()
	p.stdio = opened
	s.mu.Unlock()
	return p, nil
}

func (s *Service) forget(k key) {
	s.mu.Lock()
	delete(s.processes, k)
	s.mu.Unlock()
}

func (s *Service) lookup(k key) *process {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.processes[k]
}

func (k key) String() string {
	if k.exec == "" {
		return "container " + k.id
	}
	return "exec " + k.exec + " of container " + k.id
}

func inNamespace(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, Namespace)
}

// Create makes a container and its waiting init.
func (s *Service) Create(ctx context.Context, r *taskapi.CreateTaskRequest) (*taskapi.CreateTaskResponse, error) {
	if err := checkCreate(r); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	k := key{id: r.ID}
	p, err := s.add(k, stdio.URLs{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr}, r.Terminal)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	ok := false
	defer func() {
		if !ok { // an error, or a panic on its way to the caller
			p.stdio.Abort()
			s.forget(k)
		}
	}()
	paths := p.stdio.Paths()
	r.Stdin, r.Stdout, r.Stderr = paths.Stdin, paths.Stdout, paths.Stderr
	resp, err := s.inner.Create(inNamespace(ctx), r)
	if err != nil {
		return nil, rephrase(errgrpc.ToGRPC(err))
	}
	ok = true
	p.stdio.Started(func() { s.closeStdin(k) })
	return resp, nil
}

// Exec adds a process to a container.
func (s *Service) Exec(ctx context.Context, r *taskapi.ExecProcessRequest) (*emptypb.Empty, error) {
	if err := checkExec(r); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	k := key{r.ID, r.ExecID}
	p, err := s.add(k, stdio.URLs{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr}, r.Terminal)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	ok := false
	defer func() {
		if !ok {
			p.stdio.Abort()
			s.forget(k)
		}
	}()
	paths := p.stdio.Paths()
	r.Stdin, r.Stdout, r.Stderr = paths.Stdin, paths.Stdout, paths.Stderr
	resp, err := s.inner.Exec(inNamespace(ctx), r)
	ok = err == nil
	return resp, err
}

// Start runs a container's init, or an exec. An exec is started once only: the
// service counts an exec whose Start has failed as running for ever, and one
// whose second Start has failed as ended, over which it panics at the end of
// the init.
func (s *Service) Start(ctx context.Context, r *taskapi.StartRequest) (*taskapi.StartResponse, error) {
	k, err := checkProcess(r.ID, r.ExecID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	if k.exec == "" {
		resp, err := s.inner.Start(inNamespace(ctx), r)
		return resp, rephrase(err)
	}
	p := s.lookup(k)
	if p == nil {
		return nil, errgrpc.ToGRPCf(errdefs.ErrNotFound, "%s", k)
	}
	s.mu.Lock()
	started, failed := p.started, p.failed
	p.started = true
	s.mu.Unlock()
	switch {
	case failed:
		return nil, errgrpc.ToGRPCf(errdefs.ErrFailedPrecondition, "%s: its start has failed before", k)
	case started:
		return nil, errgrpc.ToGRPCf(errdefs.ErrFailedPrecondition, "%s: it was started before", k)
	}
	ok := false
	defer func() {
		if !ok {
			p.stdio.Abort()
			s.mu.Lock()
			p.failed = true
			s.mu.Unlock()
		}
	}()
	resp, err := s.inner.Start(inNamespace(ctx), r)
	if err != nil {
		return nil, rephrase(err)
	}
	ok = true
	p.stdio.Started(func() { s.closeStdin(k) })
	return resp, nil
}

// Delete removes a process that has ended, and with a container's init its
// execs. Streams go on delivering what they hold.
func (s *Service) Delete(ctx context.Context, r *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	k, err := checkProcess(r.ID, r.ExecID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	s.settle(ctx, k)
	resp, err := s.inner.Delete(inNamespace(ctx), r)
	if err != nil {
		return nil, err
	}
	var gone []*stdio.Process
	s.mu.Lock()
	for other, p := range s.processes {
		if other == k || (k.exec == "" && other.id == k.id) {
			delete(s.processes, other)
			if p.stdio != nil {
				gone = append(gone, p.stdio)
			}
		}
	}
	s.mu.Unlock()
	for _, p := range gone {
		p.Deleted()
	}
	return resp, nil
}

// drainGrace bounds the wait for the output of a process that has ended, which
// a child of it may hold open. The task service waits as long for a terminal.
const drainGrace = 10 * time.Second

// exitGrace bounds the time between the end of a process and its exit event.
const exitGrace = 2 * time.Second

// settle returns when the exit of a process that has ended was published and
// its output has ended, so that its deletion loses nothing: the service lets
// Wait return before the exit's event.
func (s *Service) settle(ctx context.Context, k key) {
	p := s.lookup(k)
	if p == nil {
		return
	}
	st, err := s.inner.State(inNamespace(ctx), &taskapi.StateRequest{ID: k.id, ExecID: k.exec})
	if err != nil || st.Status != task.Status_STOPPED {
		return
	}
	published, cancel := context.WithTimeout(ctx, exitGrace)
	defer cancel()
	select {
	case <-p.exited:
	case <-published.Done():
		log.L.Warnf("%s has ended without an exit event", k)
	}
	drained, cancel := context.WithTimeout(ctx, drainGrace)
	defer cancel()
	if io := s.stdio(k); io != nil {
		io.Drain(drained)
	}
}
