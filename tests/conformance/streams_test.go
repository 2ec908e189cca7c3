package conformance

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/tests/platform"
)

// random returns n bytes that do not repeat.
func random(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(b)
	return b
}

func (s *shim) closeStdin(execID string) {
	s.t.Helper()
	if _, err := s.task.CloseIO(s.call(), &taskapi.CloseIORequest{ID: s.id, ExecID: execID, Stdin: true}); err != nil {
		s.t.Fatalf("CloseIO = %v; want nil", err)
	}
}

func TestStdinRoundTrip(t *testing.T) {
	s := newShim(t, args("cat"))
	st := newStreams(t, true, false)
	s.mustCreate(st, false)
	s.mustStart("")
	sent := random(20 << 20)
	go func() {
		st.in.Write(sent)
		// CloseIO comes while data is still in the FIFO.
		s.closeStdin("")
		st.in.Close()
	}()
	if got := s.wait(""); got != 0 {
		t.Errorf("exit status = %d; want 0", got)
	}
	s.delete("")
	got := st.out.String()
	if len(got) != len(sent) || sha256.Sum256([]byte(got)) != sha256.Sum256(sent) {
		t.Errorf("got back %d bytes that differ from the %d sent", len(got), len(sent))
	}
}

func TestBurstThenExit(t *testing.T) {
	const size = 8 << 20
	s := newShim(t, args("sh", "-c", fmt.Sprintf("head -c %d /dev/zero", size)))
	st := newStreams(t, false, false)
	s.mustCreate(st, false)
	s.mustStart("")
	s.wait("")
	s.delete("")
	if got := st.out.String(); len(got) != size {
		t.Errorf("got %d bytes; want %d", len(got), size)
	}
}

// A client may close and reopen its stdin FIFO without CloseIO, and the process
// reads on.
func TestStdinReopen(t *testing.T) {
	s := newShim(t, args("cat"))
	st := newStreams(t, true, false)
	s.mustCreate(st, false)
	s.mustStart("")
	st.in.Close()
	for i := range 3 {
		f, err := os.OpenFile(st.stdin, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(f, "line %d\n", i)
		f.Close()
	}
	s.closeStdin("")
	if got := s.wait(""); got != 0 {
		t.Errorf("exit status = %d; want 0", got)
	}
	if got, want := st.out.String(), "line 0\nline 1\nline 2\n"; got != want {
		t.Errorf("stdout = %q; want %q", got, want)
	}
}

// An exec's exit is reported although a child that it left behind holds its
// output.
func TestBackgroundChildHoldsOutput(t *testing.T) {
	s := newShim(t, args("sleep", "1000"))
	s.mustCreate(nil, false)
	s.mustStart("")
	st := newStreams(t, false, false)
	if err := s.addExec("bg", st, false, "sh", "-c", "sleep 30 & echo started"); err != nil {
		t.Fatal(err)
	}
	s.mustStart("bg")
	start := time.Now()
	if got := s.wait("bg"); got != 0 {
		t.Errorf("exit status = %d; want 0", got)
	}
	// Less than what a Delete waits for output.
	if took := time.Since(start); took > 8*time.Second && !platform.Lab() {
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

// A client that stops reading holds up nothing but its own stream.
func TestClientStopsReading(t *testing.T) {
	s := newShim(t, args("sleep", "1000"))
	s.mustCreate(nil, false)
	s.mustStart("")
	st := &streams{t: t, dir: t.TempDir()}
	for _, name := range []*string{&st.stdout, &st.stderr} {
		f, err := os.CreateTemp(st.dir, "fifo")
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		os.Remove(f.Name())
		*name = f.Name()
		if err := syscall.Mkfifo(*name, 0o600); err != nil {
			t.Fatal(err)
		}
		// Held open, never read.
		held, err := os.OpenFile(*name, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer held.Close()
	}
	if err := s.addExec("deaf", st, false, "sh", "-c", "yes & sleep 1; kill $!; exit 5"); err != nil {
		t.Fatal(err)
	}
	s.mustStart("deaf")
	out, _, status := s.exec("other", "echo", "alive")
	if out != "alive\n" || status != 0 {
		t.Errorf("other exec = %q, %d; want alive, 0", out, status)
	}
	if got := s.wait("deaf"); got != 5 {
		t.Errorf("exit status = %d; want 5", got)
	}
	s.delete("deaf")
}

func TestParallelExecs(t *testing.T) {
	s := newShim(t, args("sleep", "1000"))
	s.mustCreate(nil, false)
	s.mustStart("")
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			id := fmt.Sprintf("p%d", i)
			st := newStreams(t, true, false)
			if err := s.addExec(id, st, false, "sh", "-c", "cat; exit "+fmt.Sprint(i)); err != nil {
				t.Errorf("Exec(%s) = %v", id, err)
				return
			}
			if _, err := s.task.Start(s.call(), &taskapi.StartRequest{ID: s.id, ExecID: id}); err != nil {
				t.Errorf("Start(%s) = %v", id, err)
				return
			}
			io.WriteString(st.in, id)
			st.in.Close()
			if _, err := s.task.CloseIO(s.call(), &taskapi.CloseIORequest{ID: s.id, ExecID: id, Stdin: true}); err != nil {
				t.Errorf("CloseIO(%s) = %v", id, err)
				return
			}
			resp, err := s.task.Wait(s.call(), &taskapi.WaitRequest{ID: s.id, ExecID: id})
			if err != nil || resp.ExitStatus != uint32(i) {
				t.Errorf("Wait(%s) = %v, %v; want %d", id, resp, err, i)
			}
			if _, err := s.task.Delete(s.call(), &taskapi.DeleteRequest{ID: s.id, ExecID: id}); err != nil {
				t.Errorf("Delete(%s) = %v", id, err)
			}
			if got := st.out.String(); got != id {
				t.Errorf("%s wrote %q", id, got)
			}
		}()
	}
	wg.Wait()
}

func TestTerminal(t *testing.T) {
	s := newShim(t, options{spec: func(spec *specs.Spec) {
		spec.Process.Terminal = true
		spec.Process.Args = []string{"sh", "-c", "stty size; read x; echo got $x"}
	}})
	st := newStreams(t, true, true)
	s.mustCreate(st, true)
	if _, err := s.task.ResizePty(s.call(), &taskapi.ResizePtyRequest{ID: s.id, Width: 100, Height: 40}); err != nil {
		t.Fatal(err)
	}
	s.mustStart("")
	io.WriteString(st.in, "typed\n")
	if got := s.wait(""); got != 0 {
		t.Errorf("exit status = %d; want 0", got)
	}
	s.delete("")
	if got := st.out.String(); !strings.Contains(got, "40 100") || !strings.Contains(got, "got typed") {
		t.Errorf("terminal showed %q; want size 40 100 and the line typed", got)
	}
}

func TestFileLogger(t *testing.T) {
	s := newShim(t, args("sh", "-c", "echo out; echo err >&2"))
	path := t.TempDir() + "/sub/log"
	st := &streams{t: t, stdout: "file://" + path, stderr: "file://" + path}
	s.mustCreate(st, false)
	s.mustStart("")
	s.wait("")
	s.delete("")
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Contains(got, []byte("out\n")) || !bytes.Contains(got, []byte("err\n")) {
		t.Errorf("log file = %q, %v; want out and err", got, err)
	}
}

// TestStdinEndsAtOnce: a client whose input has ended as soon as it could write
// it, in the middle of Create, asks for the task to close its stdin, as
// nerdctl does; a task that it is not shown is never closed.
func TestStdinEndsAtOnce(t *testing.T) {
	s := newShim(t, args("wc", "-l"))
	st := newStreams(t, true, false)
	st.in.Close() // the client opens its end only for writing
	closed := make(chan error, 1)
	go func() {
		f, err := os.OpenFile(st.stdin, os.O_WRONLY, 0)
		if err == nil {
			io.WriteString(f, "one\ntwo\n")
			f.Close()
			_, err = s.task.State(s.call(), &taskapi.StateRequest{ID: s.id})
		}
		if err == nil {
			_, err = s.task.CloseIO(s.call(), &taskapi.CloseIORequest{ID: s.id, Stdin: true})
		}
		closed <- err
	}()
	s.mustCreate(st, false)
	if err := <-closed; err != nil {
		t.Fatalf("close stdin as soon as it could be opened: %v; want the task to be known", err)
	}
	s.mustStart("")
	if got := s.wait(""); got != 0 {
		t.Errorf("exit status = %d; want 0", got)
	}
	s.delete("")
	if got := st.out.String(); got != "2\n" {
		t.Errorf("wc says %q; want 2", got)
	}
}
