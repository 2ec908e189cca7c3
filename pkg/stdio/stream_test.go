package stdio

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/streaming/proxy"
	transfer "github.com/containerd/containerd/v2/core/transfer/streaming"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"

	"github.com/vmrt/vmrt/pkg/streaming"
)

// streamServer is a shim's socket with nothing but streams.
type streamServer struct {
	t       testing.TB
	path    string
	service *streaming.Service
}

func serveStreams(t testing.TB) *streamServer {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	s := &streamServer{t, path, streaming.New(path)}
	s.service.Register(server)
	go server.Serve(context.Background(), l)
	t.Cleanup(func() { server.Close() })
	return s
}

func (s *streamServer) uri(id string) string { return "ttrpc+unix://" + s.path + "?streaming_id=" + id }

// client is one stream as CRI opens it: containerd's own code, and a connection
// for each stream.
type client struct {
	io.Reader
	io.Writer
	close func() error
}

func (c *client) Close() error { return c.close() }

func (s *streamServer) open(id string) *client {
	s.t.Helper()
	conn, err := net.Dial("unix", s.path)
	if err != nil {
		s.t.Fatal(err)
	}
	c := ttrpc.NewClient(conn)
	ctx, cancel := context.WithCancel(context.Background())
	st, err := proxy.NewStreamCreator(c).Create(ctx, id)
	if err != nil {
		s.t.Fatalf("open stream %s: %v", id, err)
	}
	opened := &client{close: func() error { return errors.Join(st.Close(), c.Close()) }}
	if strings.HasSuffix(id, "stdin") {
		opened.Writer = transfer.WriteByteStream(ctx, st)
	} else {
		opened.Reader = transfer.ReadByteStream(ctx, st)
	}
	s.t.Cleanup(func() { opened.Close(); cancel() })
	return opened
}

// collect reads to the end and closes, as CRI does.
func (c *client) collect() <-chan []byte {
	all := make(chan []byte, 1)
	go func() {
		b, err := io.ReadAll(c)
		if err != nil {
			b = append(b, " ["+err.Error()+"]"...)
		}
		c.Close()
		all <- b
	}()
	return all
}

// openWithStreams opens the host side of a process whose streams are all of
// the streaming service.
func (s *streamServer) openWithStreams(ctx context.Context, terminal bool, tm timing) *streams {
	s.t.Helper()
	cfg := Config{
		Namespace: "ns", ID: "web", Stdin: s.uri("web-stdin"), Stdout: s.uri("web-stdout"), Terminal: terminal,
		Streaming: s.service,
	}
	if !terminal {
		cfg.Stderr = s.uri("web-stderr")
	}
	st := new(streams)
	var err error
	if st.io, err = open(ctx, cfg, tm); err != nil {
		s.t.Fatalf("Open() = %v", err)
	}
	s.t.Cleanup(func() {
		if err := st.io.Close(); err != nil {
			s.t.Errorf("Close() = %v", err)
		}
	})
	return st
}

func TestStreams(t *testing.T) {
	for _, terminal := range []bool{false, true} {
		checkLeaks(t)
		ctx, _ := testContext(t)
		server := serveStreams(t)
		in, out := server.open("web-stdin"), server.open("web-stdout").collect()
		s := server.openWithStreams(ctx, terminal, defaultTiming)
		s.attach(t, nil)
		go func() {
			io.Copy(s.guestOut, s.guestIn)
			s.guestOut.CloseWrite()
			if s.guestErr != nil {
				s.guestErr.Write([]byte("done"))
				s.guestErr.CloseWrite()
			}
		}()
		var stderr <-chan []byte
		if !terminal {
			// After Create, as long as the process waits for it.
			stderr = server.open("web-stderr").collect()
		}
		data := randomBytes(20 << 20)
		if _, err := in.Write(data); err != nil {
			t.Fatal(err)
		}
		in.Close()
		if err := s.io.CloseStdin(); err != nil {
			t.Fatalf("CloseStdin() = %v", err)
		}
		sameBytes(t, "stdout", await(t, "stdout", out), data)
		if stderr != nil {
			if got := string(await(t, "stderr", stderr)); got != "done" {
				t.Errorf("stderr = %q; want done", got)
			}
		}
		if err := s.io.Drain(ctx); err != nil {
			t.Errorf("Drain() = %v", err)
		}
	}
}

// Streams go together with FIFOs, and with nothing.
func TestStreamsAndOthers(t *testing.T) {
	checkLeaks(t)
	ctx, _ := testContext(t)
	server := serveStreams(t)
	path := makeFIFO(t, "in")
	s := new(streams)
	var err error
	if s.io, err = Open(ctx, Config{ID: "web", Stdin: path, Stderr: server.uri("web-stderr"), Streaming: server.service}); err != nil {
		t.Fatalf("Open() = %v", err)
	}
	defer s.io.Close()
	s.attach(t, nil)
	in := openWriter(t, path)
	in.WriteString("text")
	readString(t, "stdin", s.guestIn, "text")
	got := server.open("web-stderr").collect()
	s.guestOut.Write([]byte("no destination"))
	s.guestErr.Write([]byte("problem"))
	s.guestOut.Close()
	s.guestErr.Close()
	if got := string(await(t, "stderr", got)); got != "problem" {
		t.Errorf("stderr = %q; want problem", got)
	}
	if err := s.io.Drain(ctx); err != nil {
		t.Errorf("Drain() = %v", err)
	}
}

// What a process writes before it ends waits for its client, and the process
// with it; the log and Drain say for what.
func TestStreamClientComesLate(t *testing.T) {
	checkLeaks(t)
	ctx, logged := testContext(t)
	server := serveStreams(t)
	tm := defaultTiming
	tm.open = 10 * time.Millisecond
	s := server.openWithStreams(ctx, true, tm)
	s.attach(t, nil)
	data := randomBytes(100_000)
	go func() {
		s.guestOut.Write(data)
		s.guestOut.Close()
	}()
	// Nobody is there to be waited for.
	s.io.Settle(ctx)
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	err := s.io.Drain(short)
	if want := "drain output of web: context deadline exceeded\nstdout: no client has opened stream web-stdout: not found"; err == nil || err.Error() != want || !errdefs.IsNotFound(err) {
		t.Errorf("Drain() = %v; want %s", err, want)
	}
	eventually(t, "warning", func() bool {
		return strings.Contains(logged.String(), "no client has opened stream web-stdout for 10ms: stdout waits for one")
	})
	c := server.open("web-stdout")
	readString(t, "stdout", c, string(data[:10]))
	c.Close()
	eventually(t, "client has left", func() bool {
		err := s.io.Drain(short)
		return err != nil && strings.Contains(err.Error(), "stdout: no client has stream web-stdout open: unavailable")
	})
	rest := await(t, "stdout", server.open("web-stdout").collect())
	if err := s.io.Drain(ctx); err != nil {
		t.Errorf("Drain() = %v", err)
	}
	if !bytes.HasSuffix(data, rest) {
		t.Errorf("second client read %d bytes that are not the end of what was written", len(rest))
	}
}

// Settle returns when the client has read all, or does not read.
func TestSettle(t *testing.T) {
	checkLeaks(t)
	ctx, _ := testContext(t)
	server := serveStreams(t)
	tm := defaultTiming
	tm.quiet = patience
	s := server.openWithStreams(ctx, false, tm)
	out, stderr := server.open("web-stdout"), server.open("web-stderr").collect()
	s.attach(t, nil)
	s.guestOut.Write([]byte("last words"))
	s.guestOut.Close()
	s.guestErr.Close()
	settled := start(func() { s.io.Settle(ctx) })
	await(t, "stderr", stderr)
	select {
	case <-settled:
		t.Error("Settle() returned before the client has read the end")
	case <-time.After(50 * time.Millisecond):
	}
	if got := string(await(t, "stdout", out.collect())); got != "last words" {
		t.Errorf("stdout = %q; want last words", got)
	}
	await(t, "Settle", settled)

	// With nothing that moves it gives up.
	s.io.Close()
	tm.quiet = 20 * time.Millisecond
	s = server.openWithStreams(ctx, true, tm)
	server.open("web-stdout")
	s.attach(t, nil)
	go s.guestOut.Write(randomBytes(1 << 20))
	await(t, "Settle", start(func() { s.io.Settle(ctx) }))
}

// Settle does nothing for FIFOs.
func TestSettleFIFO(t *testing.T) {
	checkLeaks(t)
	ctx, _ := testContext(t)
	s := openStreams(t, ctx, true)
	s.io.Settle(ctx)
	s.attach(t, nil)
	s.guestOut.Write([]byte("x"))
	s.io.Settle(ctx)
}

// A client that pauses for longer than ttrpc waits for it loses nothing of a
// process that writes many small pieces.
func TestStreamClientPauses(t *testing.T) {
	checkLeaks(t)
	ctx, _ := testContext(t)
	server := serveStreams(t)
	c := server.open("web-stdout")
	s := server.openWithStreams(ctx, true, defaultTiming)
	// As with vsock, and unlike a socket pair, what is written in pieces is
	// read in one.
	host, guest := tcpPair(t)
	s.io.Attach(nil, host, nil)
	const lines = 100_000
	go func() {
		for range lines {
			guest.Write([]byte("line\n"))
		}
		guest.Close()
	}()
	readString(t, "stdout", c, "line\n")
	time.Sleep(3 * time.Second) // ttrpc waits for one
	got := await(t, "stdout", c.collect())
	sameBytes(t, "stdout", got, bytes.Repeat([]byte("line\n"), lines)[5:])
}

func tcpPair(t testing.TB) (host, guest *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a.(*net.TCPConn), b.(*net.TCPConn)
}

// The client of a process that has ended its stdin is not held up.
func TestStreamStdinEnded(t *testing.T) {
	checkLeaks(t)
	ctx, _ := testContext(t)
	server := serveStreams(t)
	s := server.openWithStreams(ctx, true, defaultTiming)
	s.attach(t, nil)
	c := server.open("web-stdin")
	c.Write([]byte("text"))
	readString(t, "stdin", s.guestIn, "text")
	s.guestIn.Close()
	sent := make(chan error, 1)
	go func() { _, err := c.Write(make([]byte, 1<<20)); sent <- err }()
	if err := await(t, "client's write", sent); err != nil {
		t.Errorf("client's write to a stdin that has ended = %v; want nil", err)
	}
	s.guestOut.Write([]byte("alive"))
	readString(t, "stdout", server.open("web-stdout"), "alive")
}

func TestStreamsCloseHalfBuilt(t *testing.T) {
	for _, tc := range []struct {
		name string
		use  func(t *testing.T, server *streamServer, s *streams)
	}{
		{"opened", func(*testing.T, *streamServer, *streams) {}},
		{"client", func(_ *testing.T, server *streamServer, _ *streams) { server.open("web-stdout") }},
		{"attached", func(t *testing.T, _ *streamServer, s *streams) { s.attach(t, nil) }},
		{"attached nothing", func(_ *testing.T, _ *streamServer, s *streams) { s.io.Attach(nil, nil, nil) }},
		{"busy", func(t *testing.T, server *streamServer, s *streams) {
			s.attach(t, nil)
			go s.guestOut.Write(make([]byte, 1<<20))
			c := server.open("web-stdin")
			go c.Write(make([]byte, 64<<10))
			readString(t, "stdout", server.open("web-stdout"), "\x00")
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			checkLeaks(t)
			ctx, _ := testContext(t)
			server := serveStreams(t)
			s := server.openWithStreams(ctx, false, defaultTiming)
			tc.use(t, server, s)
			for range 2 {
				if err := s.io.Close(); err != nil {
					t.Errorf("Close() = %v", err)
				}
			}
			if err := errors.Join(s.io.CloseStdin(), s.io.Drain(ctx)); err != nil {
				t.Errorf("CloseStdin, Drain after Close = %v", err)
			}
			s.io.Settle(ctx)
			// The ids can be used again.
			server.openWithStreams(ctx, false, defaultTiming)
		})
	}
}
