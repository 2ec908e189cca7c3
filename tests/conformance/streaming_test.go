package conformance

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/v2/core/streaming/proxy"
	transfer "github.com/containerd/containerd/v2/core/transfer/streaming"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// streamURI is what CRI makes with io_type = "streaming".
func (s *shim) streamURI(id string) string {
	return "ttrpc+unix://" + s.socket + "?streaming_id=" + id
}

// openStream opens a stream as CRI does: by containerd's own client, on a
// connection that ends with the stream.
func (s *shim) openStream(id string) *stream {
	s.t.Helper()
	conn, err := net.Dial("unix", s.socket)
	if err != nil {
		s.t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	// CRI ends this context in Cancel, before it deletes a task.
	ctx, cancel := context.WithCancel(s.ctx)
	st, err := proxy.NewStreamCreator(client).Create(ctx, id)
	if err != nil {
		s.t.Fatalf("open stream %s: %v", id, err)
	}
	opened := &stream{cancel: cancel, close: func() error { return errors.Join(st.Close(), client.Close()) }}
	if strings.HasSuffix(id, "stdin") {
		opened.Writer = transfer.WriteByteStream(ctx, st)
	} else {
		opened.Reader = transfer.ReadByteStream(ctx, st)
	}
	s.t.Cleanup(func() { cancel(); opened.Close() })
	return opened
}

type stream struct {
	io.Reader
	io.Writer
	cancel func()
	close  func() error
}

func (c *stream) Close() error { return c.close() }

// collect reads to the end and closes, as CRI does.
func (c *stream) collect() *collector {
	all := newCollector()
	go func() {
		defer close(all.done)
		if _, err := io.Copy(all, c); err != nil {
			fmt.Fprintf(all, " [%v]", err)
		}
		c.Close()
	}()
	return all
}

// streamNames are the streams of a process, not opened.
func (s *shim) streamNames(id string, stdin, terminal bool) *streams {
	st := &streams{t: s.t, stdout: s.streamURI(id + "-stdout")}
	if !terminal {
		st.stderr = s.streamURI(id + "-stderr")
	}
	if stdin {
		st.stdin = s.streamURI(id + "-stdin")
	}
	return st
}

// newServedStreams opens the streams of a process and starts to read its
// outputs. stdin is nil if the process has none.
func (s *shim) newServedStreams(id string, stdin, terminal bool) (st *streams, in *stream) {
	s.t.Helper()
	st = s.streamNames(id, stdin, terminal)
	if stdin {
		in = s.openStream(id + "-stdin")
	}
	st.out = s.openStream(id + "-stdout").collect()
	if !terminal {
		st.err = s.openStream(id + "-stderr").collect()
	}
	return st, in
}

// endStdin ends a process's stdin as CRI does.
func (s *shim) endStdin(execID string, in *stream) {
	in.Close()
	if _, err := s.task.CloseIO(s.call(), &taskapi.CloseIORequest{ID: s.id, ExecID: execID, Stdin: true}); err != nil {
		s.t.Errorf("CloseIO(%q) = %v; want nil", execID, err)
	}
}

func sameSum(t *testing.T, what, got string, want []byte) {
	t.Helper()
	if len(got) != len(want) || sha256.Sum256([]byte(got)) != sha256.Sum256(want) {
		t.Errorf("%s: %d bytes that differ from the %d sent", what, len(got), len(want))
	}
}

func TestStreamingRoundTrip(t *testing.T) {
	s := newShim(t, args("sh", "-c", "cat; echo done >&2"))
	st, in := s.newServedStreams(s.id, true, false)
	s.mustCreate(st, false)
	// containerd has the names from here after it was restarted.
	if state, err := s.task.State(s.call(), &taskapi.StateRequest{ID: s.id}); err != nil || state.Stdout != st.stdout {
		t.Errorf("State = %v, %v; want stdout %s", state, err, st.stdout)
	}
	s.mustStart("")
	sent := random(20 << 20)
	go func() {
		in.Write(sent)
		s.endStdin("", in)
	}()
	if got := s.wait(""); got != 0 {
		t.Errorf("exit status = %d; want 0", got)
	}
	s.delete("")
	sameSum(t, "stdout", st.out.String(), sent)
	if got := st.err.String(); got != "done\n" {
		t.Errorf("stderr = %q; want done", got)
	}
}

// CRI ends a container's streams when it hears of its exit: everything must be
// there by then.
func TestStreamingBurstThenExit(t *testing.T) {
	const size = 8 << 20
	s := newShim(t, args("sh", "-c", fmt.Sprintf("head -c %d /dev/zero", size)))
	st := s.streamNames(s.id, false, false)
	out, errs := s.openStream(s.id+"-stdout"), s.openStream(s.id+"-stderr")
	st.out, st.err = out.collect(), errs.collect()
	s.mustCreate(st, false)
	s.mustStart("")
	s.wait("")
	out.cancel()
	errs.cancel()
	s.delete("")
	if got := st.out.String(); len(got) != size || st.err.String() != "" {
		t.Errorf("got %d bytes that end %q, and %q; want %d and nothing", len(got), got[max(0, len(got)-60):], st.err.String(), size)
	}
}

func TestStreaming(t *testing.T) {
	s := newShim(t, args("sleep", "1000"))
	st, _ := s.newServedStreams(s.id, false, false)
	s.mustCreate(st, false)
	s.mustStart("")
	for _, tc := range []struct {
		name string
		test func(*testing.T, *shim)
	}{
		{"parallel execs", streamingExecs},
		{"terminal", streamingTerminal},
		{"background child", streamingBackgroundChild},
		{"client stops reading", streamingDeafClient},
		{"client comes back", streamingReconnect},
		{"blocked until the client comes back", streamingBlocked},
		{"exit before the stream is opened", streamingLateClient},
		{"never opened", streamingNeverOpened},
		{"process does not read", streamingUnreadStdin},
		{"wrong address", streamingWrongAddress},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.test(t, &shim{t: t, id: s.id, socket: s.socket, client: s.client, task: s.task, ctx: s.ctx, pids: s.pids})
		})
	}
}

func (s *shim) mustExec(id string, st *streams, terminal bool, args ...string) {
	s.t.Helper()
	if err := s.addExec(id, st, terminal, args...); err != nil {
		s.t.Fatalf("Exec(%s) = %v; want nil", id, err)
	}
	s.mustStart(id)
}

func streamingExecs(t *testing.T, s *shim) {
	var wg sync.WaitGroup
	for i := range 10 {
		id := fmt.Sprintf("e%d", i)
		st, in := s.newServedStreams(id, true, false)
		wg.Go(func() {
			if err := s.addExec(id, st, false, "sh", "-c", fmt.Sprintf("cat; echo %s >&2; exit %d", id, i)); err != nil {
				t.Errorf("Exec(%s) = %v", id, err)
				return
			}
			if _, err := s.task.Start(s.call(), &taskapi.StartRequest{ID: s.id, ExecID: id}); err != nil {
				t.Errorf("Start(%s) = %v", id, err)
				return
			}
			sent := random(1 << 20)
			in.Write(sent)
			s.endStdin(id, in)
			resp, err := s.task.Wait(s.call(), &taskapi.WaitRequest{ID: s.id, ExecID: id})
			if err != nil || resp.ExitStatus != uint32(i) {
				t.Errorf("Wait(%s) = %v, %v; want %d", id, resp, err, i)
			}
			// CRI reads to the end before it deletes an exec.
			sameSum(t, id, st.out.String(), sent)
			if got := st.err.String(); got != id+"\n" {
				t.Errorf("%s wrote %q to stderr", id, got)
			}
			if _, err := s.task.Delete(s.call(), &taskapi.DeleteRequest{ID: s.id, ExecID: id}); err != nil {
				t.Errorf("Delete(%s) = %v", id, err)
			}
		})
	}
	wg.Wait()
}

func streamingTerminal(t *testing.T, s *shim) {
	st, in := s.newServedStreams("tty", true, true)
	if err := s.addExec("tty", st, true, "sh", "-c", "read x; stty size; echo got $x"); err != nil {
		t.Fatal(err)
	}
	s.mustStart("tty")
	if _, err := s.task.ResizePty(s.call(), &taskapi.ResizePtyRequest{ID: s.id, ExecID: "tty", Width: 100, Height: 40}); err != nil {
		t.Fatal(err)
	}
	io.WriteString(in, "typed\n")
	if got := s.wait("tty"); got != 0 {
		t.Errorf("exit status = %d; want 0", got)
	}
	if got := st.out.String(); !strings.Contains(got, "40 100") || !strings.Contains(got, "got typed") {
		t.Errorf("terminal showed %q; want size 40 100 and the line typed", got)
	}
	s.delete("tty")
}

func streamingBackgroundChild(t *testing.T, s *shim) {
	st, _ := s.newServedStreams("bg", false, false)
	start := time.Now()
	s.mustExec("bg", st, false, "sh", "-c", "sleep 40 & echo started")
	if got := s.wait("bg"); got != 0 {
		t.Errorf("exit status = %d; want 0", got)
	}
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("exit was reported after %v; want at once", took)
	}
	select {
	case <-st.out.done:
		t.Error("stdout ended while a child holds it")
	default:
	}
	// Delete gives up on the child's output.
	s.delete("bg")
	if got := st.out.String(); got != "started\n" {
		t.Errorf("stdout = %q; want started", got)
	}
}

func streamingDeafClient(t *testing.T, s *shim) {
	s.openStream("deaf-stdout")
	s.openStream("deaf-stderr")
	s.mustExec("deaf", s.streamNames("deaf", false, false), false, "sh", "-c", "yes & sleep 1; kill $!; exit 5")
	other, _ := s.newServedStreams("other", false, false)
	s.mustExec("other", other, false, "echo", "alive")
	if got := other.out.String(); got != "alive\n" {
		t.Errorf("other exec wrote %q; want alive", got)
	}
	if got := s.wait("other"); got != 0 {
		t.Errorf("exit status of the other = %d; want 0", got)
	}
	if got := s.wait("deaf"); got != 5 {
		t.Errorf("exit status = %d; want 5", got)
	}
	s.delete("other")
	s.delete("deaf")
}

// A client that goes away and comes back gets what was written in between, and
// the end, although the process has ended by then.
func streamingReconnect(t *testing.T, s *shim) {
	in, out := s.openStream("back-stdin"), s.openStream("back-stdout")
	s.mustExec("back", s.streamNames("back", true, true), true, "sh", "-c", "stty -echo; echo first; read x; echo $x; exit 3")
	buf := make([]byte, len("first\r\n"))
	if _, err := io.ReadFull(out, buf); err != nil || string(buf) != "first\r\n" {
		t.Fatalf("client read %q, %v; want first", buf, err)
	}
	out.Close()
	in.Close()
	in = s.openStream("back-stdin")
	io.WriteString(in, "second\n")
	if got := s.wait("back"); got != 3 {
		t.Errorf("exit status = %d; want 3", got)
	}
	if got := s.openStream("back-stdout").collect().String(); got != "second\r\n" {
		t.Errorf("second client read %q; want second", got)
	}
	s.delete("back")
}

// What is more than the buffers hold waits for the client too.
func streamingBlocked(t *testing.T, s *shim) {
	const size = 4 << 20
	errs := s.openStream("blocked-stderr").collect()
	s.mustExec("blocked", s.streamNames("blocked", false, false), false, "sh", "-c", fmt.Sprintf("head -c %d /dev/zero; echo written >&2", size))
	for i := range 2 {
		out := s.openStream("blocked-stdout")
		if n, err := io.CopyN(io.Discard, out, 1<<10); err != nil {
			t.Fatalf("client %d read %d bytes, %v", i, n, err)
		}
		out.Close()
	}
	select {
	case <-errs.done:
		t.Errorf("process has ended with %q although nobody reads", errs.String())
	default:
	}
	got := len(s.openStream("blocked-stdout").collect().String())
	// Two clients have left what they had allowed, 128 KiB each.
	if got > size-2<<10 || got < size-2*(128<<10) {
		t.Errorf("last client read %d bytes; want nearly %d", got, size)
	}
	if status := s.wait("blocked"); status != 0 || errs.String() != "written\n" {
		t.Errorf("exit status %d, stderr %q; want 0, written", status, errs.String())
	}
	s.delete("blocked")
}

func streamingLateClient(t *testing.T, s *shim) {
	s.mustExec("late", s.streamNames("late", false, false), false, "sh", "-c", "echo out; echo err >&2; exit 7")
	if got := s.wait("late"); got != 7 {
		t.Errorf("exit status = %d; want 7", got)
	}
	if got := s.openStream("late-stdout").collect().String(); got != "out\n" {
		t.Errorf("stdout = %q; want out", got)
	}
	if got := s.openStream("late-stderr").collect().String(); got != "err\n" {
		t.Errorf("stderr = %q; want err", got)
	}
	start := time.Now()
	s.delete("late")
	if took := time.Since(start); took > 8*time.Second {
		t.Errorf("Delete took %v; want no wait for output that was read", took)
	}
}

func streamingNeverOpened(t *testing.T, s *shim) {
	s.mustExec("never", s.streamNames("never", false, false), false, "echo", "out")
	if got := s.wait("never"); got != 0 {
		t.Errorf("exit status = %d; want 0", got)
	}
	start := time.Now()
	s.delete("never")
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("Delete took %v; want 10 s", took)
	}
}

// A client that writes to a process that has ended is not held up.
func streamingUnreadStdin(t *testing.T, s *shim) {
	st, in := s.newServedStreams("unread", true, false)
	sent := make(chan error, 1)
	go func() { _, err := in.Write(random(4 << 20)); sent <- err }()
	s.mustExec("unread", st, false, "true")
	if got := s.wait("unread"); got != 0 {
		t.Errorf("exit status = %d; want 0", got)
	}
	<-st.out.done
	select {
	case err := <-sent:
		if err != nil {
			t.Errorf("client's write = %v; want nil", err)
		}
	case <-time.After(callTimeout):
		t.Error("client waits for a process that has ended")
	}
	s.endStdin("unread", in)
	s.delete("unread")
}

func streamingWrongAddress(t *testing.T, s *shim) {
	st := &streams{stdout: "ttrpc+unix:///run/other?streaming_id=a"}
	if err := s.addExec("wrong", st, false, "true"); err != nil {
		t.Fatal(err)
	}
	_, err := s.task.Start(s.call(), &taskapi.StartRequest{ID: s.id, ExecID: "wrong"})
	if err := errgrpc.ToNative(err); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "not this shim's address") {
		t.Errorf("Start with a stream of another shim = %v; want an invalid argument", err)
	}
	s.delete("wrong")
}

// A container's exit is reported although its client does not read, or is not
// there.
func TestStreamingExitNotHeldUp(t *testing.T) {
	for _, client := range []bool{true, false} {
		s := newShim(t, args("sh", "-c", "head -c 1000000 /dev/zero & sleep 1; exit 9"))
		var opened []*stream
		if client {
			opened = append(opened, s.openStream(s.id+"-stdout"), s.openStream(s.id+"-stderr"))
		}
		s.mustCreate(s.streamNames(s.id, false, false), false)
		s.mustStart("")
		start := time.Now()
		if got := s.wait(""); got != 9 {
			t.Errorf("exit status = %d; want 9", got)
		}
		if took := time.Since(start); took > 8*time.Second {
			t.Errorf("exit was reported after %v; want at most a second more than the process took", took)
		}
		for _, o := range opened {
			o.collect() // so that Delete need not wait
		}
		if !client {
			start = time.Now()
			s.delete("")
			if took := time.Since(start); took > 20*time.Second {
				t.Errorf("Delete took %v; want 10 s", took)
			}
			if log := s.log.String(); !strings.Contains(log, "no client has opened stream "+s.id+"-stdout") {
				t.Error("log does not tell of the stream that nobody opened")
			}
		}
	}
}

func TestStreamingCreateRefused(t *testing.T) {
	s := newShim(t, options{spec: func(spec *specs.Spec) { spec.Process.Args = []string{"true"} }})
	for uri, want := range map[string]string{
		"ttrpc+unix:///run/other?streaming_id=a": "not this shim's address",
		"grpc+unix://" + s.socket:                "transport grpc+unix is not served",
		"ttrpc+unix://" + s.socket:               "no streaming_id",
	} {
		_, err := s.create(&streams{stdout: uri}, false)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Create with stdout %s = %v; want %s", uri, err, want)
		}
	}
}
