package conformance

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	// Registers the type URLs of the OCI spec.
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	_ "github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// streams are a client's ends of one process's FIFOs, as containerd's clients
// make them.
type streams struct {
	t                     testing.TB
	dir                   string
	stdin, stdout, stderr string
	// in is the client's write end; nil when the process has no stdin.
	in *os.File
	// out and err collect what the process wrote.
	out, err *collector
}

// collector reads a FIFO to its end.
type collector struct {
	done chan struct{}

	mu   sync.Mutex
	buf  bytes.Buffer
	more chan struct{} // closed and replaced at each Write
}

func newCollector() *collector {
	return &collector{done: make(chan struct{}), more: make(chan struct{})}
}

func (c *collector) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buf.Write(p)
	close(c.more)
	c.more = make(chan struct{})
	return len(p), nil
}

// String waits for the end of the stream.
func (c *collector) String() string {
	<-c.done
	return c.buf.String()
}

// text returns what was written so far.
func (c *collector) text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf.String()
}

// waitFor waits until text was written.
func (c *collector) waitFor(t testing.TB, text string) {
	t.Helper()
	timeout := time.After(callTimeout)
	for {
		c.mu.Lock()
		got, more := c.buf.String(), c.more
		c.mu.Unlock()
		if strings.Contains(got, text) {
			return
		}
		select {
		case <-more:
		case <-c.done:
			t.Fatalf("stream ended with %q; want %q in it", got, text)
		case <-timeout:
			t.Fatalf("stream has %q; want %q in it", got, text)
		}
	}
}

// newStreams makes FIFOs and starts to read the outputs.
func newStreams(t testing.TB, stdin, terminal bool) *streams {
	t.Helper()
	s := &streams{t: t, dir: t.TempDir()}
	fifo := func(name string) string {
		path := filepath.Join(s.dir, name)
		if err := syscall.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	s.stdout = fifo("stdout")
	s.out = collect(t, s.stdout)
	if !terminal {
		s.stderr = fifo("stderr")
		s.err = collect(t, s.stderr)
	}
	if stdin {
		s.stdin = fifo("stdin")
		// Opened for both directions, this waits for no reader.
		f, err := os.OpenFile(s.stdin, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		s.in = f
		t.Cleanup(func() { f.Close() })
	}
	return s
}

func collect(t testing.TB, path string) *collector {
	t.Helper()
	c := newCollector()
	go func() {
		defer close(c.done)
		// Blocks until the shim opens its end.
		f, err := os.OpenFile(path, os.O_RDONLY, 0)
		if err != nil {
			return
		}
		defer f.Close()
		io.Copy(c, f)
	}()
	t.Cleanup(func() {
		select {
		case <-c.done:
		default:
			// Nobody ever opened it: let the reader go.
			if f, err := os.OpenFile(path, os.O_WRONLY|syscall.O_NONBLOCK, 0); err == nil {
				f.Close()
			}
		}
	})
	return c
}

// call returns a context for one request.
func (s *shim) call() context.Context {
	ctx, cancel := context.WithTimeout(s.ctx, callTimeout)
	s.t.Cleanup(cancel)
	return ctx
}

// create makes the shim's container; st may be nil.
func (s *shim) create(st *streams, terminal bool) (uint32, error) {
	r := &taskapi.CreateTaskRequest{ID: s.id, Bundle: s.bundle, Terminal: terminal}
	if s.runtime != nil {
		r.Options = s.runtime.options
	}
	if st != nil {
		r.Stdin, r.Stdout, r.Stderr = st.stdin, st.stdout, st.stderr
	}
	resp, err := s.task.Create(s.call(), r)
	if err == nil {
		s.pids.add(resp.Pid)
	}
	return resp.GetPid(), err
}

func (s *shim) mustCreate(st *streams, terminal bool) uint32 {
	s.t.Helper()
	pid, err := s.create(st, terminal)
	if err != nil {
		s.t.Fatalf("Create = %v; want nil", err)
	}
	return pid
}

func (s *shim) mustStart(execID string) uint32 {
	s.t.Helper()
	resp, err := s.task.Start(s.call(), &taskapi.StartRequest{ID: s.id, ExecID: execID})
	if err != nil {
		s.t.Fatalf("Start(%q) = %v; want nil", execID, err)
	}
	return resp.Pid
}

// wait returns the exit status of init or an exec.
func (s *shim) wait(execID string) uint32 {
	s.t.Helper()
	resp, err := s.task.Wait(s.call(), &taskapi.WaitRequest{ID: s.id, ExecID: execID})
	if err != nil {
		s.t.Fatalf("Wait(%q) = %v; want nil", execID, err)
	}
	if age := time.Since(resp.ExitedAt.AsTime()).Abs(); age > time.Minute {
		s.t.Errorf("Wait(%q) exited at %v, %v from now", execID, resp.ExitedAt.AsTime(), age)
	}
	return resp.ExitStatus
}

func (s *shim) delete(execID string) *taskapi.DeleteResponse {
	s.t.Helper()
	resp, err := s.task.Delete(s.call(), &taskapi.DeleteRequest{ID: s.id, ExecID: execID})
	if err != nil {
		s.t.Fatalf("Delete(%q) = %v; want nil", execID, err)
	}
	return resp
}

// run starts the shim's container and returns its outputs and exit status.
func (s *shim) run() (stdout, stderr string, status uint32) {
	s.t.Helper()
	st := newStreams(s.t, false, false)
	s.mustCreate(st, false)
	s.mustStart("")
	status = s.wait("")
	return st.out.String(), st.err.String(), status
}

// addExec records an exec of a shell command.
func (s *shim) addExec(id string, st *streams, terminal bool, args ...string) error {
	spec := &specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}, Terminal: terminal}
	return s.addExecSpec(id, st, spec)
}

func (s *shim) addExecSpec(id string, st *streams, spec *specs.Process) error {
	s.t.Helper()
	encoded, err := typeurl.MarshalAnyToProto(spec)
	if err != nil {
		s.t.Fatal(err)
	}
	r := &taskapi.ExecProcessRequest{ID: s.id, ExecID: id, Spec: encoded, Terminal: spec.Terminal}
	if st != nil {
		r.Stdin, r.Stdout, r.Stderr = st.stdin, st.stdout, st.stderr
	}
	_, err = s.task.Exec(s.call(), r)
	return err
}

// exec runs a command in the container to its end.
func (s *shim) exec(id string, args ...string) (stdout, stderr string, status uint32) {
	s.t.Helper()
	st := newStreams(s.t, false, false)
	if err := s.addExec(id, st, false, args...); err != nil {
		s.t.Fatalf("Exec(%s) = %v; want nil", id, err)
	}
	s.mustStart(id)
	status = s.wait(id)
	s.delete(id)
	return st.out.String(), st.err.String(), status
}

// args is an option that makes the container run this command.
func args(a ...string) options {
	return options{spec: func(s *specs.Spec) { s.Process.Args = a }}
}
