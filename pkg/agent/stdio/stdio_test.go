package stdio

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/fifo"

	"github.com/vmrt/vmrt/api"
)

// patience bounds what a test waits for; nothing waits that long when it works.
const patience = 20 * time.Second

func testLimits() Limits {
	l := DefaultLimits()
	l.Linger = 200 * time.Millisecond
	return l
}

// host is the far end of a registry: it dials streams.
type host struct {
	t        *testing.T
	registry *Registry
	dir      string // for FIFOs
	addr     string
}

func newHost(t *testing.T, l Limits) *host {
	t.Helper()
	checkLeaks(t)
	dir := t.TempDir()
	addr := filepath.Join(dir, "s")
	listener, err := net.Listen("unix", addr)
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, registry: NewRegistry(l), dir: filepath.Join(dir, "io"), addr: addr}
	if err := os.Mkdir(h.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- h.registry.Serve(listener) }()
	t.Cleanup(func() {
		listener.Close()
		if err := <-served; err != nil {
			t.Errorf("Serve() = %v; want nil after the listener's close", err)
		}
		h.registry.Close()
	})
	return h
}

// connect dials without a header.
func (h *host) connect() *net.UnixConn {
	h.t.Helper()
	c, err := net.Dial("unix", h.addr)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.UnixConn)
}

// dial makes the stream name takeable.
func (h *host) dial(name string) *net.UnixConn {
	h.t.Helper()
	c := h.connect()
	if err := api.WriteStreamHeader(c, name); err != nil {
		h.t.Fatal(err)
	}
	var ack [1]byte
	if _, err := io.ReadFull(c, ack[:]); err != nil || ack[0] != api.StreamAck {
		h.t.Fatalf("acknowledgement of %s = %q, %v; want %q", name, ack, err, api.StreamAck)
	}
	return c
}

func (h *host) open(u URLs, terminal bool) *Process {
	h.t.Helper()
	p, err := h.registry.Open(h.dir, u, terminal)
	if err != nil {
		h.t.Fatal(err)
	}
	return p
}

// service opens the FIFOs in the way of containerd's task service: outputs
// for both directions and at once, stdin's ends each in a goroutine.
type service struct {
	stdout, stdoutKeep, stderr, stderrKeep io.ReadWriteCloser
	stdin, stdinKeep                       io.ReadWriteCloser
}

func openService(t *testing.T, p Paths) *service {
	t.Helper()
	s := &service{}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	open := func(ctx context.Context, path string, flag int) io.ReadWriteCloser {
		f, err := fifo.OpenFifo(ctx, path, flag, 0)
		if err != nil {
			t.Fatalf("open %s: %v", path, err)
		}
		return f
	}
	if p.Stdin != "" {
		s.stdinKeep = open(context.Background(), p.Stdin, syscall.O_WRONLY|syscall.O_NONBLOCK)
	}
	if p.Stdout != "" {
		s.stdout, s.stdoutKeep = open(ctx, p.Stdout, syscall.O_WRONLY), open(ctx, p.Stdout, syscall.O_RDONLY)
	}
	if p.Stderr != "" {
		s.stderr, s.stderrKeep = open(ctx, p.Stderr, syscall.O_WRONLY), open(ctx, p.Stderr, syscall.O_RDONLY)
	}
	if p.Stdin != "" {
		s.stdin = open(context.Background(), p.Stdin, syscall.O_RDONLY|syscall.O_NONBLOCK)
	}
	return s
}

// closeOutputs is what the copiers do when the process's pipes have ended.
func (s *service) closeOutputs() {
	for _, f := range []io.Closer{s.stdout, s.stdoutKeep, s.stderr, s.stderrKeep} {
		if f != nil {
			f.Close()
		}
	}
}

func (s *service) closeAll() {
	s.closeOutputs()
	for _, f := range []io.Closer{s.stdinKeep, s.stdin} {
		if f != nil {
			f.Close()
		}
	}
}

func waitFor(t *testing.T, p *Process) {
	t.Helper()
	done := make(chan struct{})
	go func() { p.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("the process's stdio is not closed")
	}
}

// noise is n bytes that do not repeat.
func noise(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

func TestLargeTransferBothWays(t *testing.T) {
	const size = 20 << 20
	h := newHost(t, testLimits())
	in, out, errs := h.dial("in"), h.dial("out"), h.dial("err")
	p := h.open(URLs{api.StreamURL("in"), api.StreamURL("out"), api.StreamURL("err")}, false)
	s := openService(t, p.Paths())
	closed := make(chan struct{})
	p.Started(func() { s.stdinKeep.Close(); close(closed) })

	data := noise(size)
	want := sha256.Sum256(data)
	go func() {
		in.Write(data)
		in.CloseWrite()
	}()
	go func() { // the process copies stdin to stdout, and says so on stderr
		n, _ := io.Copy(s.stdout, s.stdin)
		fmt.Fprintf(s.stderr, "%d", n)
		s.closeOutputs()
	}()
	sum := sha256.New()
	if n, err := io.Copy(sum, out); n != size || err != nil {
		t.Errorf("stdout = %d bytes, %v; want %d", n, err, size)
	}
	if got := [32]byte(sum.Sum(nil)); got != want {
		t.Errorf("stdout's checksum = %x; want %x", got, want)
	}
	if b, err := io.ReadAll(errs); string(b) != fmt.Sprint(size) || err != nil {
		t.Errorf("stderr = %q, %v; want %d", b, err, size)
	}
	select {
	case <-closed:
	case <-time.After(patience):
		t.Error("the task service's end of stdin was not closed")
	}
	out.Close()
	errs.Close()
	p.Deleted()
	waitFor(t, p)
	s.closeAll()
	checkEmpty(t, h.dir)
}

// The end of input must follow the last byte, also when the process reads
// late, and also when there is no byte at all.
func TestStdinHalfClose(t *testing.T) {
	for _, size := range []int{0, 1, 3 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			h := newHost(t, testLimits())
			in := h.dial("in")
			p := h.open(URLs{Stdin: api.StreamURL("in")}, false)
			data := noise(size)
			go func() {
				in.Write(data)
				in.CloseWrite()
			}()
			s := openService(t, Paths{Stdin: p.Paths().Stdin})
			p.Started(func() { s.stdinKeep.Close() })
			got, err := io.ReadAll(s.stdin)
			if sha256.Sum256(got) != sha256.Sum256(data) || err != nil {
				t.Errorf("stdin = %d bytes, %v; want the %d sent", len(got), err, size)
			}
			// The agent closes the connection when the process has it all.
			if _, err := in.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("read from the stdin stream = %v; want EOF", err)
			}
			p.Deleted()
			waitFor(t, p)
			s.closeAll()
		})
	}
}

func TestStdinWithoutHalfCloseStaysOpen(t *testing.T) {
	h := newHost(t, testLimits())
	in := h.dial("in")
	p := h.open(URLs{Stdin: api.StreamURL("in")}, false)
	s := openService(t, Paths{Stdin: p.Paths().Stdin})
	p.Started(func() { t.Error("stdin was closed without a half-close") })
	for _, word := range []string{"one", "two"} {
		io.WriteString(in, word)
		got := make([]byte, len(word))
		if _, err := io.ReadFull(s.stdin, got); string(got) != word || err != nil {
			t.Fatalf("stdin = %q, %v; want %q", got, err, word)
		}
	}
	p.Deleted()
	waitFor(t, p)
	s.closeAll()
}

// A process that has closed its stdin makes the host's writes fail.
func TestStdinClosedByProcess(t *testing.T) {
	h := newHost(t, testLimits())
	in := h.dial("in")
	p := h.open(URLs{Stdin: api.StreamURL("in")}, false)
	s := openService(t, Paths{Stdin: p.Paths().Stdin})
	p.Started(func() { t.Error("stdin was closed without a half-close") })
	io.WriteString(in, "x")
	if _, err := s.stdin.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	s.stdin.Close()
	var err error
	for err == nil {
		_, err = in.Write(make([]byte, 1024))
	}
	if !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("write to a closed stdin = %v; want EPIPE", err)
	}
	waitFor(t, p)
	s.closeAll()
}

// The host reads nothing: the process must be able to write what the FIFO
// holds and end, and Deleted must end the stream.
func TestHostDoesNotRead(t *testing.T) {
	h := newHost(t, testLimits())
	h.dial("out")
	p := h.open(URLs{Stdout: api.StreamURL("out")}, false)
	s := openService(t, Paths{Stdout: p.Paths().Stdout})
	p.Started(nil)
	written := make(chan struct{})
	go func() { // far more than FIFO and sockets hold
		s.stdout.Write(noise(8 << 20))
		s.closeOutputs()
		close(written)
	}()
	select {
	case <-written:
		t.Fatal("8 MiB fitted into a stream that nobody reads")
	case <-time.After(100 * time.Millisecond):
	}
	p.Deleted()
	waitFor(t, p)
	select {
	case <-written:
	case <-time.After(patience):
		t.Error("the task service's writer is still blocked after Deleted")
	}
}

// After Deleted a host that reads slowly still gets everything.
func TestDeletedDeliversTheRest(t *testing.T) {
	h := newHost(t, testLimits())
	out := h.dial("out")
	p := h.open(URLs{Stdout: api.StreamURL("out")}, false)
	s := openService(t, Paths{Stdout: p.Paths().Stdout})
	p.Started(nil)
	data := noise(128 << 10) // fits into the FIFO
	s.stdout.Write(data)
	s.closeOutputs()
	p.Deleted()
	var got []byte
	for b := make([]byte, 8<<10); ; time.Sleep(20 * time.Millisecond) {
		n, err := out.Read(b)
		got = append(got, b[:n]...)
		if err != nil {
			break
		}
	}
	if sha256.Sum256(got) != sha256.Sum256(data) {
		t.Errorf("stdout after Deleted = %d bytes; want the %d written", len(got), len(data))
	}
	out.Close()
	waitFor(t, p)
}

// A host that gives a stream up must not block the process.
func TestHostAbandonsOutput(t *testing.T) {
	h := newHost(t, testLimits())
	out := h.dial("out")
	p := h.open(URLs{Stdout: api.StreamURL("out")}, false)
	s := openService(t, Paths{Stdout: p.Paths().Stdout})
	p.Started(nil)
	out.Close()
	written := make(chan struct{})
	go func() {
		s.stdout.Write(noise(4 << 20))
		s.closeOutputs()
		close(written)
	}()
	select {
	case <-written:
	case <-time.After(patience):
		t.Error("a process is blocked by a stream that the host has closed")
	}
	waitFor(t, p)
}

// Output stays open as long as the task service holds it, whatever exits.
func TestOutputOfBackgroundChild(t *testing.T) {
	h := newHost(t, testLimits())
	out := h.dial("out")
	p := h.open(URLs{Stdout: api.StreamURL("out")}, false)
	s := openService(t, Paths{Stdout: p.Paths().Stdout})
	p.Started(nil)
	for range 3 {
		io.WriteString(s.stdout, "tick")
		b := make([]byte, 4)
		if _, err := io.ReadFull(out, b); string(b) != "tick" || err != nil {
			t.Fatalf("stdout = %q, %v; want tick", b, err)
		}
	}
	s.closeOutputs()
	if b, err := io.ReadAll(out); len(b) > 0 || err != nil {
		t.Errorf("stdout = %q, %v; want its end", b, err)
	}
	out.Close()
	waitFor(t, p)
}

func TestAbort(t *testing.T) {
	h := newHost(t, testLimits())
	conns := []*net.UnixConn{h.dial("in"), h.dial("out"), h.dial("err")}
	p := h.open(URLs{api.StreamURL("in"), api.StreamURL("out"), api.StreamURL("err")}, false)
	p.Abort()
	p.Abort()
	p.Deleted()
	waitFor(t, p)
	for i, c := range conns {
		if _, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("stream %d: read after Abort = %v; want EOF", i, err)
		}
	}
	checkEmpty(t, h.dir)
}

// The task service may have opened FIFOs before it failed.
func TestAbortAfterOpen(t *testing.T) {
	h := newHost(t, testLimits())
	h.dial("in")
	h.dial("out")
	p := h.open(URLs{Stdin: api.StreamURL("in"), Stdout: api.StreamURL("out")}, false)
	paths := p.Paths()
	s := openService(t, Paths{Stdin: paths.Stdin, Stdout: paths.Stdout})
	p.Abort()
	s.closeAll() // returns only if the opens were not left waiting
	waitFor(t, p)
	checkEmpty(t, h.dir)
}

func TestDeletedWithoutStart(t *testing.T) {
	h := newHost(t, testLimits())
	in := h.dial("in")
	h.dial("out")
	p := h.open(URLs{Stdin: api.StreamURL("in"), Stdout: api.StreamURL("out")}, false)
	io.WriteString(in, "never read")
	p.Deleted()
	waitFor(t, p)
	checkEmpty(t, h.dir)
}

// Deleted may come while the input still waits for the service's reader.
func TestDeletedWhileOpening(t *testing.T) {
	h := newHost(t, testLimits())
	h.dial("in")
	p := h.open(URLs{Stdin: api.StreamURL("in")}, false)
	p.Started(func() { t.Error("stdin was closed") })
	p.Deleted()
	waitFor(t, p)
	checkEmpty(t, h.dir)
}

func TestOpenPaths(t *testing.T) {
	for _, tt := range []struct {
		name     string
		urls     URLs
		terminal bool
		want     Paths // "*" is a FIFO
	}{
		{"nothing", URLs{}, false, Paths{}},
		{"stdout only", URLs{Stdout: "a"}, false, Paths{Stdout: "*", Stderr: discard}},
		{"stderr only", URLs{Stderr: "a"}, false, Paths{Stdout: discard, Stderr: "*"}},
		{"stdin only", URLs{Stdin: "a"}, false, Paths{Stdin: "*", Stdout: discard, Stderr: discard}},
		{"terminal", URLs{Stdin: "a", Stdout: "b"}, true, Paths{Stdin: "*", Stdout: "*"}},
		{"terminal without streams", URLs{}, true, Paths{Stdout: discard}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t, testLimits())
			u := tt.urls
			for _, f := range []*string{&u.Stdin, &u.Stdout, &u.Stderr} {
				if *f != "" {
					h.dial(*f)
					*f = api.StreamURL(*f)
				}
			}
			p := h.open(u, tt.terminal)
			got := p.Paths()
			for _, f := range []*string{&got.Stdin, &got.Stdout, &got.Stderr} {
				if ok, _ := fifo.IsFifo(*f); ok {
					*f = "*"
				}
			}
			if got != tt.want {
				t.Errorf("Paths() = %+v; want %+v", got, tt.want)
			}
			p.Abort()
			waitFor(t, p)
			checkEmpty(t, h.dir)
		})
	}
}

func TestOpenErrors(t *testing.T) {
	for _, tt := range []struct {
		name     string
		urls     URLs
		terminal bool
		want     error
	}{
		{"unknown stream", URLs{Stdout: api.StreamURL("nobody")}, false, errdefs.ErrNotFound},
		{"path", URLs{Stdout: "/run/fifo"}, false, errdefs.ErrInvalidArgument},
		{"file", URLs{Stdout: "file:///tmp/log"}, false, errdefs.ErrInvalidArgument},
		{"binary", URLs{Stdin: "binary:///bin/sh"}, false, errdefs.ErrInvalidArgument},
		{"stderr of a terminal", URLs{Stderr: api.StreamURL("known")}, true, errdefs.ErrInvalidArgument},
		{"second unknown", URLs{api.StreamURL("known"), api.StreamURL("nobody"), ""}, false, errdefs.ErrNotFound},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t, testLimits())
			h.dial("known")
			_, err := h.registry.Open(h.dir, tt.urls, tt.terminal)
			if !errors.Is(err, tt.want) {
				t.Errorf("Open(%+v) = %v; want %v", tt.urls, err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), "failed") {
				t.Errorf("Open(%+v) = %v; want an error of operation and object", tt.urls, err)
			}
			checkEmpty(t, h.dir)
		})
	}
}

func checkEmpty(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > 0 {
		t.Errorf("files left in %s = %v, %v; want none", dir, entries, err)
	}
}
