package stdio

import (
	"context"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/fifo"
	"golang.org/x/sys/unix"

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

// process is the far end of a Process: what a process, or for a terminal the
// task service, has open.
type process struct {
	stdin          io.ReadCloser
	stdout, stderr io.WriteCloser
	others         []io.Closer // ends that the task service holds besides
	stdinKeep      io.Closer   // its write end of a terminal's stdin
}

// launch does what starting the process does. Pipes are inherited; FIFOs are
// opened in the way of containerd's task service: the output for both
// directions and at once, stdin's ends each in a goroutine.
func launch(t *testing.T, p *Process) *process {
	t.Helper()
	s := &process{}
	if !p.Terminal() {
		f := p.Files()
		s.stdin, s.stdout, s.stderr = inherit(t, f.Stdin), inherit(t, f.Stdout), inherit(t, f.Stderr)
		p.Handed()
		return s
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	open := func(ctx context.Context, path string, flag int) io.ReadWriteCloser {
		f, err := fifo.OpenFifo(ctx, path, flag, 0)
		if err != nil {
			t.Fatalf("open %s: %v", path, err)
		}
		return f
	}
	paths := p.Paths()
	if paths.Stdin != "" {
		s.stdinKeep = open(context.Background(), paths.Stdin, syscall.O_WRONLY|syscall.O_NONBLOCK)
		s.stdin = open(context.Background(), paths.Stdin, syscall.O_RDONLY|syscall.O_NONBLOCK)
	}
	s.stdout = open(ctx, paths.Stdout, syscall.O_WRONLY)
	s.others = append(s.others, open(ctx, paths.Stdout, syscall.O_RDONLY))
	return s
}

// inherit returns a copy of f, as a child process has one.
func inherit(t *testing.T, f *os.File) *os.File {
	t.Helper()
	if f == nil {
		return nil
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), f.Name())
}

// started calls p.Started in the way of the task service's wrapper.
func (s *process) started(p *Process) { p.Started(s.closeStdin) }

func (s *process) closeStdin() {
	if s.stdinKeep != nil {
		s.stdinKeep.Close()
	}
}

// closeOutputs is the end of the process.
func (s *process) closeOutputs() {
	for _, f := range append(s.others, s.stdout, s.stderr) {
		if f != nil && !reflect.ValueOf(f).IsNil() {
			f.Close()
		}
	}
}

func (s *process) closeAll() {
	s.closeOutputs()
	s.closeStdin()
	if s.stdin != nil && !reflect.ValueOf(s.stdin).IsNil() {
		s.stdin.Close()
	}
}

// bothKinds runs a test with pipes and with a terminal's FIFOs.
func bothKinds(t *testing.T, f func(t *testing.T, terminal bool)) {
	t.Run("pipes", func(t *testing.T) { f(t, false) })
	t.Run("terminal", func(t *testing.T) { f(t, true) })
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

func checkEmpty(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > 0 {
		t.Errorf("files left in %s = %v, %v; want none", dir, entries, err)
	}
}
