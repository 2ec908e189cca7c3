package streaming

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/services/streaming/v1"
	core "github.com/containerd/containerd/v2/core/streaming"
	"github.com/containerd/containerd/v2/core/streaming/proxy"
	"github.com/containerd/containerd/v2/core/transfer/streaming"
	"github.com/containerd/ttrpc"
)

// patience bounds what must happen in the end, on a machine however busy.
const patience = time.Minute

// server is a Service on a socket.
type server struct {
	*Service
	t    testing.TB
	path string
}

// serve starts a service. It must have no stream and no goroutine left at the
// end of the test.
func serve(t testing.TB, change func(*limits)) *server {
	t.Helper()
	goroutines := runtime.NumGoroutine()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := New(path)
	if change != nil {
		change(&s.limits)
	}
	srv, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	s.Register(srv)
	go srv.Serve(context.Background(), l)
	t.Cleanup(func() {
		eventually(t, "end of all streams", func() bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			return len(s.streams) == 0 && s.unclaimed == 0
		})
		srv.Close()
		eventually(t, "end of all goroutines", func() bool { return runtime.NumGoroutine() <= goroutines })
	})
	return &server{s, t, path}
}

func (s *server) output(id string) *Output {
	s.t.Helper()
	o, err := s.Output(id)
	if err != nil {
		s.t.Fatalf("Output(%s) = %v; want nil", id, err)
	}
	s.t.Cleanup(o.Close)
	return o
}

func (s *server) input(id string) *Input {
	s.t.Helper()
	in, err := s.Input(id)
	if err != nil {
		s.t.Fatalf("Input(%s) = %v; want nil", id, err)
	}
	s.t.Cleanup(in.Close)
	return in
}

func (s *server) dial() *ttrpc.Client {
	s.t.Helper()
	conn, err := net.Dial("unix", s.path)
	if err != nil {
		s.t.Fatal(err)
	}
	c := ttrpc.NewClient(conn)
	s.t.Cleanup(func() { c.Close() })
	return c
}

// closer closes a stream as CRI does: with the connection that it is alone on.
type closer struct {
	core.Stream
	conn *ttrpc.Client
}

func (c closer) Close() error { return errors.Join(c.Stream.Close(), c.conn.Close()) }

// open opens a stream by containerd's own client, on a connection of its own.
func (s *server) open(id string) core.Stream {
	s.t.Helper()
	conn := s.dial()
	st, err := proxy.NewStreamCreator(conn).Create(s.context(), id)
	if err != nil {
		s.t.Fatalf("open stream %s = %v; want nil", id, err)
	}
	return closer{st, conn}
}

func (s *server) context() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	s.t.Cleanup(cancel)
	return ctx
}

// reader and writer are what CRI makes of a stream.
func (s *server) reader(id string) io.ReadCloser {
	s.t.Helper()
	return streaming.ReadByteStream(s.context(), s.open(id))
}

func (s *server) writer(id string) io.WriteCloser {
	s.t.Helper()
	return streaming.WriteByteStream(s.context(), s.open(id))
}

// call opens the RPC without containerd's client.
func (s *server) call() api.TTRPCStreaming_StreamClient {
	s.t.Helper()
	st, err := api.NewTTRPCStreamingClient(s.dial()).Stream(s.context())
	if err != nil {
		s.t.Fatal(err)
	}
	return st
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

func sameBytes(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		g, w := sha256.Sum256(got), sha256.Sum256(want)
		t.Fatalf("%s: got %d bytes, sha256 %x; want %d bytes, %x", what, len(got), g[:4], len(want), w[:4])
	}
}

// run returns what f returns, when it does.
func run[T any](f func() T) <-chan T {
	c := make(chan T, 1)
	go func() { c <- f() }()
	return c
}

// result returns the next value of c.
func result[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("%s: nothing after %v", what, patience)
		panic("unreachable")
	}
}

// waits fails unless c stays silent for a moment.
func waits[T any](t testing.TB, what string, c <-chan T) {
	t.Helper()
	select {
	case v := <-c:
		t.Fatalf("%s = %v; want it to wait", what, v)
	case <-time.After(50 * time.Millisecond):
	}
}

// eventually waits for what has no event.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%s: not after %v\n%s", what, patience, buf[:runtime.Stack(buf, true)])
		}
	}
}

// readAll reads to the end and closes, as CRI does.
func readAll(r io.ReadCloser) <-chan []byte {
	return run(func() []byte {
		b, err := io.ReadAll(r)
		if err != nil {
			b = append(b, " ["+err.Error()+"]"...)
		}
		r.Close()
		return b
	})
}

func readString(t testing.TB, r io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(r, got); err != nil || string(got) != want {
		t.Fatalf("client read %q, %v; want %q", got[:n], err, want)
	}
}

// write writes to an output and returns a channel with the error.
func write(o *Output, p []byte) <-chan error {
	return run(func() error {
		_, err := o.Write(p)
		return err
	})
}
