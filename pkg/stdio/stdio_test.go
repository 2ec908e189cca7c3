package stdio

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestWants(t *testing.T) {
	type wants struct{ Stdin, Stdout, Stderr bool }
	const some = "/dev/null"
	for _, tc := range []struct {
		name string
		cfg  Config
		want wants
	}{
		{"null", Config{}, wants{}},
		{"all", Config{Stdin: some, Stdout: some, Stderr: some}, wants{true, true, true}},
		{"outputs", Config{Stdout: some, Stderr: some}, wants{false, true, true}},
		{"stdout alone", Config{Stdout: some}, wants{false, true, true}},
		{"stderr alone", Config{Stderr: some}, wants{false, true, true}},
		{"stdin alone", Config{Stdin: some}, wants{true, true, true}},
		{"terminal", Config{Stdin: some, Stdout: some, Stderr: some, Terminal: true}, wants{true, true, false}},
		{"terminal without stdin", Config{Stdout: some, Terminal: true}, wants{false, true, false}},
		{"terminal without names", Config{Terminal: true}, wants{false, true, false}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			checkLeaks(t)
			s, err := Open(t.Context(), tc.cfg)
			if err != nil {
				t.Fatalf("Open() = %v", err)
			}
			defer s.Close()
			var got wants
			got.Stdin, got.Stdout, got.Stderr = s.Wants()
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("Wants() (-want +got):\n%s", diff)
			}
		})
	}
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	missing := filepath.Join(dir, "missing")
	blocked := filepath.Join(dir, "blocked")
	if err := os.WriteFile(blocked, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		cfg  Config
		want string
		is   error
	}{
		{"stdin missing", Config{Stdin: missing}, "open stdin " + missing + " of web: no such file or directory", os.ErrNotExist},
		{"stdout missing", Config{Stdout: missing}, "open stdout " + missing + " of web: no such file or directory", os.ErrNotExist},
		{"stderr missing", Config{Stdout: "/dev/null", Stderr: missing}, "open stderr " + missing + " of web: no such file or directory", os.ErrNotExist},
		{"terminal's stdout missing", Config{Stdout: missing, Terminal: true}, "open stdout " + missing + " of web: no such file or directory", os.ErrNotExist},
		{"folder", Config{Stdout: dir}, "open stdout " + dir + " of web: is a directory", unix.EISDIR},
		{"log folder", Config{Stdout: "file://" + blocked + "/log"}, "make folder of log file " + blocked + "/log of web: not a directory", unix.ENOTDIR},
		{"log file", Config{Stdout: "file://" + dir}, "open log file " + dir + " of web: is a directory", unix.EISDIR},
		{"scheme", Config{Stdout: "gopher:///x"}, "unknown STDIO scheme gopher", nil},
		{"URI", Config{Stdout: "/a%zz"}, `parse stdout URI: parse "/a%zz": invalid URL escape "%zz"`, nil},
		{"streaming stdout", Config{Stdout: "ttrpc+unix:///run/s.sock?streaming_id=a"}, "open stdout of web: stdout: STDIO scheme ttrpc+unix: not implemented", errdefs.ErrNotImplemented},
		{"streaming stdin", Config{Stdin: "grpc+vsock://3:1?streaming_id=a"}, "open stdin of web: stdin: STDIO scheme grpc+vsock: not implemented", errdefs.ErrNotImplemented},
		{"no logger", Config{Namespace: "ns", Stdout: "binary://" + missing}, "start logger " + missing + " of web: no such file or directory", os.ErrNotExist},
		{"logger not executable", Config{Namespace: "ns", Stdout: "binary://" + blocked}, "start logger " + blocked + " of web: permission denied", os.ErrPermission},
		{"logger without path", Config{Namespace: "ns", Stdout: "binary://logger"}, "start logger  of web: exec: no command", nil},
		{"logger without namespace", Config{Stdout: "binary:///bin/true"}, "start logger /bin/true of web: no namespace: failed precondition", errdefs.ErrFailedPrecondition},
	} {
		t.Run(tc.name, func(t *testing.T) {
			checkLeaks(t)
			tc.cfg.ID = "web"
			s, err := Open(t.Context(), tc.cfg)
			if err == nil {
				s.Close()
				t.Fatal("Open() = nil error")
			}
			if err.Error() != tc.want {
				t.Errorf("Open() = %q; want %q", err, tc.want)
			}
			if tc.is != nil && !errors.Is(err, tc.is) {
				t.Errorf("Open() = %v, which is no %v", err, tc.is)
			}
		})
	}
	var typed *NotImplementedError
	_, err := Open(t.Context(), Config{Stdout: "ttrpc+unix:///s"})
	if !errors.As(err, &typed) || typed.Scheme != "ttrpc+unix" || typed.Stream != "stdout" {
		t.Errorf("Open() = %#v; want a NotImplementedError", err)
	}
}

// What the client sends comes back from the guest, both at full speed.
func TestTransferBothWays(t *testing.T) {
	for _, tc := range []struct {
		name     string
		terminal bool
		shortcut bool
	}{{name: "plain"}, {name: "terminal", terminal: true}, {name: "connection moves bytes", shortcut: true}} {
		t.Run(tc.name, func(t *testing.T) {
			checkLeaks(t)
			ctx, _ := testContext(t)
			s := openStreams(t, ctx, tc.terminal)
			var used [3]bool
			var n int
			s.attach(t, func(c Conn) Conn {
				if !tc.shortcut {
					return c
				}
				n++
				return shortcut{c, &used[n-1]}
			})
			go func() {
				io.Copy(s.guestOut, s.guestIn)
				s.guestOut.CloseWrite()
				if s.guestErr != nil {
					s.guestErr.CloseWrite()
				}
			}()
			data := randomBytes(20 << 20)
			out := readAll(s.stdout)
			if _, err := io.Copy(s.stdin, bytes.NewReader(data)); err != nil {
				t.Fatal(err)
			}
			s.stdin.Close()
			if err := s.io.CloseStdin(); err != nil {
				t.Fatalf("CloseStdin() = %v", err)
			}
			sameBytes(t, "stdout", await(t, "stdout", out), data)
			if err := s.io.Drain(ctx); err != nil {
				t.Errorf("Drain() = %v", err)
			}
			if want := [3]bool{tc.shortcut, tc.shortcut, tc.shortcut}; used != want {
				t.Errorf("connections that moved bytes = %v; want %v", used, want)
			}
		})
	}
}

// A burst before the end is kept for a client that is late to read it, and
// Drain tells when it is delivered.
func TestBurstThenDrain(t *testing.T) {
	checkLeaks(t)
	ctx, _ := testContext(t)
	s := openStreams(t, ctx, false)
	s.attach(t, nil)
	data := randomBytes(8 << 20)
	go func() {
		s.guestOut.Write(data)
		s.guestOut.Close()
		s.guestErr.Close()
	}()
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	err := s.io.Drain(short)
	if want := "drain output of web: context deadline exceeded"; err == nil || err.Error() != want {
		t.Errorf("Drain() with an unread burst = %v; want %s", err, want)
	}
	out := readAll(s.stdout)
	if err := s.io.Drain(ctx); err != nil {
		t.Errorf("Drain() = %v", err)
	}
	// The FIFO is closed by then: the client reads the end without Close.
	sameBytes(t, "stdout", await(t, "stdout", out), data)
	done, cancel := context.WithCancel(ctx)
	cancel()
	if err := s.io.Drain(done); err != nil {
		t.Errorf("Drain() of drained output with an ended context = %v", err)
	}
}

func TestWriteSizes(t *testing.T) {
	checkLeaks(t)
	ctx, _ := testContext(t)
	s := openStreams(t, ctx, false)
	s.attach(t, nil)
	var want []byte
	var writes [][]byte
	for _, n := range []int{1, 2, idleSize - 1, idleSize, idleSize + 1, 4095, 4096, 4097, bufferSize - 1, bufferSize, bufferSize + 1, 3*bufferSize + 7} {
		for range 3 {
			b := randomBytes(n)
			writes, want = append(writes, b), append(want, b...)
		}
	}
	var wg sync.WaitGroup
	for _, w := range []*net.UnixConn{s.guestOut, s.guestErr} {
		wg.Go(func() {
			for _, b := range writes {
				w.Write(b)
			}
			w.CloseWrite()
		})
	}
	wg.Go(func() {
		for _, b := range writes {
			s.stdin.Write(b)
		}
		s.stdin.Close()
		s.io.CloseStdin()
	})
	out, errs, in := readAll(s.stdout), readAll(s.stderr), readAll(s.guestIn)
	sameBytes(t, "stdout", await(t, "stdout", out), want)
	sameBytes(t, "stderr", await(t, "stderr", errs), want)
	sameBytes(t, "stdin", await(t, "stdin", in), want)
	wg.Wait()
}

func TestReaderAbsent(t *testing.T) {
	for _, remove := range []bool{false, true} {
		checkLeaks(t)
		path := makeFIFO(t, "out")
		ctx, cancel := context.WithCancel(t.Context())
		opened := make(chan error, 1)
		go func() {
			_, err := Open(ctx, Config{ID: "web", Stdout: path})
			opened <- err
		}()
		select {
		case err := <-opened:
			t.Fatalf("Open() without a reader = %v; want it to wait", err)
		case <-time.After(50 * time.Millisecond):
		}
		if remove {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
		cancel()
		err := await(t, "Open", opened)
		if want := "open stdout " + path + " of web: no reader: context canceled"; err == nil || err.Error() != want {
			t.Errorf("Open() = %v; want %s", err, want)
		}
	}
}

// The end of the wait is never missed, even before it has begun.
func TestReaderGivenUpAtOnce(t *testing.T) {
	checkLeaks(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	path := makeFIFO(t, "out")
	for range 500 {
		if _, err := Open(ctx, Config{ID: "web", Stdout: path}); !errors.Is(err, context.Canceled) {
			t.Fatalf("Open() = %v; want it canceled", err)
		}
	}
}

func TestReaderNeverComes(t *testing.T) {
	checkLeaks(t)
	tm := defaultTiming
	tm.open = 10 * time.Millisecond
	_, err := open(t.Context(), Config{ID: "web", Stdin: makeFIFO(t, "in"), Stdout: makeFIFO(t, "out")}, tm)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Open() = %v; want a deadline exceeded", err)
	}
}

// The reader opens as a client's blocking open(2) does, before or after Open.
func TestReaderLate(t *testing.T) {
	for _, name := range []string{"before", "after"} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			ctx, _ := testContext(t)
			cfg := Config{ID: "web", Stdout: makeFIFO(t, "out"), Terminal: true}
			reader := make(chan []byte, 1)
			read := func() {
				f, err := os.Open(cfg.Stdout)
				if err != nil {
					t.Error(err)
				}
				defer f.Close()
				reader <- <-readAll(f)
			}
			if name == "before" {
				go read()
			} else {
				time.AfterFunc(30*time.Millisecond, read)
			}
			s, err := Open(ctx, cfg)
			if err != nil {
				t.Fatalf("Open() = %v", err)
			}
			host, guest := connPair(t)
			s.Attach(nil, host, nil)
			guest.Write([]byte("early"))
			guest.Close()
			// Close at once: what is delivered stays so.
			if err := s.Drain(ctx); err != nil {
				t.Errorf("Drain() = %v", err)
			}
			if err := s.Close(); err != nil {
				t.Errorf("Close() = %v", err)
			}
			if got := await(t, "reader", reader); string(got) != "early" {
				t.Errorf("client read %q; want %q", got, "early")
			}
		})
	}
}

// A client that stops reading stdout blocks stdout alone, and the guest's
// writer rather than the host's memory.
func TestReaderStops(t *testing.T) {
	checkLeaks(t)
	ctx, _ := testContext(t)
	s := openStreams(t, ctx, false)
	s.attach(t, nil)

	var accepted int
	chunk := randomBytes(64 << 10)
	s.guestOut.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
	for {
		n, err := s.guestOut.Write(chunk)
		accepted += n
		if err != nil {
			break
		}
	}
	// The socket's buffers, one buffer here, the FIFO.
	if limit := 2 << 20; accepted > limit {
		t.Errorf("guest could write %d bytes that nobody reads; want at most %d", accepted, limit)
	}
	s.guestErr.Write([]byte("still here"))
	readString(t, "stderr", s.stderr, "still here")
	s.stdin.Write([]byte("me too"))
	readString(t, "stdin", s.guestIn, "me too")

	begin := time.Now()
	if err := s.io.Close(); err != nil {
		t.Errorf("Close() = %v", err)
	}
	if took := time.Since(begin); took > defaultTiming.pumps {
		t.Errorf("Close() of a blocked stream took %v", took)
	}
}

// A client may go away and come back. What waits in the FIFO is kept for it.
func TestReaderReturns(t *testing.T) {
	checkLeaks(t)
	ctx, _ := testContext(t)
	s := openStreams(t, ctx, false)
	s.attach(t, nil)
	s.guestOut.Write([]byte("first"))
	readString(t, "stdout", s.stdout, "first")
	path := s.stdout.Name()
	s.stdout.Close()
	s.guestOut.Write([]byte("second"))
	eventually(t, "output without a reader", func() bool { return pending(s.io.stdout.(files)[0]) })
	out := openReader(t, path)
	readString(t, "stdout", out, "second")
	s.guestOut.CloseWrite()
	readEnd(t, "stdout", out)
}

func TestStdinReopened(t *testing.T) {
	for _, terminal := range []bool{false, true} {
		checkLeaks(t)
		ctx, _ := testContext(t)
		s := openStreams(t, ctx, terminal)
		s.attach(t, nil)
		path := s.stdin.Name()
		for _, text := range []string{"first", "second", "third"} {
			s.stdin.Write([]byte(text))
			s.stdin.Close()
			readString(t, "stdin", s.guestIn, text)
			silent(t, "stdin without a writer", s.guestIn)
			s.stdin = openWriter(t, path)
		}
		// CloseStdin waits for the last client.
		for range 2 {
			if err := s.io.CloseStdin(); err != nil {
				t.Fatalf("CloseStdin() = %v", err)
			}
		}
		silent(t, "stdin that a client has open", s.guestIn)
		s.stdin.Write([]byte("last"))
		s.stdin.Close()
		readString(t, "stdin", s.guestIn, "last")
		readEnd(t, "stdin", s.guestIn)
		// Half of the connection only: outputs go on.
		s.guestOut.Write([]byte("alive"))
		readString(t, "stdout", s.stdout, "alive")
		if err := s.io.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	}
}

func TestCloseStdinDoesNotOvertake(t *testing.T) {
	for _, attachFirst := range []bool{false, true} {
		checkLeaks(t)
		ctx, _ := testContext(t)
		s := openStreams(t, ctx, false)
		if attachFirst {
			s.attach(t, nil)
		}
		data := randomBytes(60_000) // fits into a FIFO
		if _, err := s.stdin.Write(data); err != nil {
			t.Fatal(err)
		}
		s.stdin.Close()
		if err := s.io.CloseStdin(); err != nil {
			t.Fatalf("CloseStdin() = %v", err)
		}
		if !attachFirst {
			s.attach(t, nil)
		}
		sameBytes(t, "stdin", await(t, "stdin", readAll(s.guestIn)), data)
	}
}

// CloseStdin returns although the guest takes nothing and the FIFO is full.
func TestCloseStdinNeverBlocks(t *testing.T) {
	checkLeaks(t)
	ctx, _ := testContext(t)
	s := openStreams(t, ctx, false)
	s.attach(t, nil)
	s.stdin.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := s.stdin.Write(randomBytes(8 << 20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("client's write to a process that does not read = %v; want it to block", err)
	}
	closed := make(chan error, 1)
	go func() { closed <- s.io.CloseStdin() }()
	if err := await(t, "CloseStdin", closed); err != nil {
		t.Errorf("CloseStdin() = %v", err)
	}
}

// Files that are no FIFOs work as well.
func TestPlainFiles(t *testing.T) {
	checkLeaks(t)
	ctx, _ := testContext(t)
	dir := t.TempDir()
	cfg := Config{ID: "web", Stdin: filepath.Join(dir, "in"), Stdout: filepath.Join(dir, "out")}
	cfg.Stderr = cfg.Stdout
	for path, text := range map[string]string{cfg.Stdin: "input", cfg.Stdout: "kept\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := new(streams)
	var err error
	if s.io, err = Open(ctx, cfg); err != nil {
		t.Fatalf("Open() = %v", err)
	}
	defer s.io.Close()
	s.attach(t, nil)
	if got := await(t, "stdin", readAll(s.guestIn)); string(got) != "input" {
		t.Errorf("guest read %q; want %q", got, "input")
	}
	s.guestOut.Write([]byte("out\n"))
	s.guestOut.Close()
	s.guestErr.Close()
	if err := s.io.Drain(ctx); err != nil {
		t.Errorf("Drain() = %v", err)
	}
	got, err := os.ReadFile(cfg.Stdout)
	if err != nil || string(got) != "kept\nout\n" {
		t.Errorf("stdout holds %q, %v; want %q", got, err, "kept\nout\n")
	}
}

func TestLogFile(t *testing.T) {
	checkLeaks(t)
	ctx, _ := testContext(t)
	old := unix.Umask(0)
	t.Cleanup(func() { unix.Umask(old) })
	dir := filepath.Join(t.TempDir(), "a", "b")
	path := filepath.Join(dir, "log")
	const lines = 2000
	for range 2 { // the second appends
		s := new(streams)
		var err error
		if s.io, err = Open(ctx, Config{ID: "web", Stdout: "file://" + path, Stderr: "file://" + path}); err != nil {
			t.Fatalf("Open() = %v", err)
		}
		s.attach(t, nil)
		var wg sync.WaitGroup
		for text, w := range map[string]*net.UnixConn{"out\n": s.guestOut, "err\n": s.guestErr} {
			wg.Go(func() {
				for range lines {
					w.Write([]byte(text))
				}
				w.Close()
			})
		}
		wg.Wait()
		if err := s.io.Drain(ctx); err != nil {
			t.Errorf("Drain() = %v", err)
		}
		if err := s.io.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"out", "err"} {
		if n := strings.Count(string(got), text); n != 2*lines {
			t.Errorf("log has %q %d times; want %d", text, n, 2*lines)
		}
	}
	for _, f := range []struct {
		path string
		want os.FileMode
	}{{path, 0o644}, {dir, 0o755}, {filepath.Dir(dir), 0o755}} {
		if fi, err := os.Stat(f.path); err != nil || fi.Mode().Perm() != f.want {
			t.Errorf("mode of %s = %v, %v; want %v", f.path, fi.Mode().Perm(), err, f.want)
		}
	}
}

// A full disk costs bytes and a warning, not the process.
func TestOutputRefused(t *testing.T) {
	checkLeaks(t)
	ctx, logged := testContext(t)
	s := new(streams)
	var err error
	if s.io, err = Open(ctx, Config{ID: "web", Stdout: "/dev/full"}); err != nil {
		t.Fatalf("Open() = %v", err)
	}
	defer s.io.Close()
	s.attach(t, nil)
	s.guestOut.SetWriteDeadline(time.Now().Add(patience))
	if _, err := s.guestOut.Write(make([]byte, 8<<20)); err != nil {
		t.Fatalf("guest's write = %v; want it dropped", err)
	}
	s.guestErr.Write([]byte("no destination"))
	s.guestOut.Close()
	s.guestErr.Close()
	if err := s.io.Drain(ctx); err != nil {
		t.Errorf("Drain() = %v", err)
	}
	for _, want := range []string{"stdout is refused", "no space left on device", "8388608 bytes of stdout dropped"} {
		if got := logged.String(); strings.Count(got, want) != 1 {
			t.Errorf("log = %q; want %q in it once", got, want)
		}
	}
}

// faulty is a connection that breaks after some bytes.
type faulty struct {
	Conn
	left int
}

var errBroken = errors.New("connection broken")

func (c *faulty) Read(p []byte) (int, error) {
	if c.left == 0 {
		return 0, errBroken
	}
	n, err := c.Conn.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}

func TestGuestBreaks(t *testing.T) {
	checkLeaks(t)
	ctx, logged := testContext(t)
	s := openStreams(t, ctx, false)
	s.attach(t, func(c Conn) Conn { return &faulty{Conn: c, left: 100_000} })
	data := randomBytes(200_000)
	go s.guestOut.Write(data)
	// What arrived is delivered, then the client reads the end.
	sameBytes(t, "stdout", await(t, "stdout", readAll(s.stdout)), data[:100_000])
	s.guestErr.Close()
	if err := s.io.Drain(ctx); err != nil {
		t.Errorf("Drain() = %v", err)
	}
	if got := logged.String(); !strings.Contains(got, "stdout ended early") || !strings.Contains(got, errBroken.Error()) {
		t.Errorf("log = %q; want the broken connection in it", got)
	}
	// Without a reader in the guest, the client of stdin gets EPIPE.
	s.guestIn.Close()
	s.stdin.SetWriteDeadline(time.Now().Add(patience))
	for {
		if _, err := s.stdin.Write(data); err != nil {
			if !errors.Is(err, unix.EPIPE) {
				t.Errorf("client's write to stdin = %v; want EPIPE", err)
			}
			break
		}
	}
}

func TestCloseHalfBuilt(t *testing.T) {
	for _, tc := range []struct {
		name string
		use  func(t *testing.T, s *streams)
	}{
		{"opened", func(*testing.T, *streams) {}},
		{"stdin closed", func(_ *testing.T, s *streams) { s.io.CloseStdin() }},
		{"attached", func(t *testing.T, s *streams) { s.attach(t, nil) }},
		{"attached nothing", func(t *testing.T, s *streams) {
			s.io.Attach(nil, nil, nil)
			// Streams without a connection end at once.
			readEnd(t, "stdout", s.stdout)
			readEnd(t, "stderr", s.stderr)
			if err := s.io.Drain(t.Context()); err != nil {
				t.Errorf("Drain() = %v", err)
			}
		}},
		{"attached one", func(t *testing.T, s *streams) {
			host, guest := connPair(t)
			s.io.Attach(nil, host, nil)
			guest.Write([]byte("text"))
			readString(t, "stdout", s.stdout, "text")
		}},
		{"attached twice", func(t *testing.T, s *streams) {
			s.attach(t, nil)
			host, guest := connPair(t)
			s.io.Attach(host, nil, nil)
			readEnd(t, "second connection", guest)
			s.guestOut.Write([]byte("text"))
			readString(t, "stdout", s.stdout, "text")
		}},
		{"busy", func(t *testing.T, s *streams) {
			s.attach(t, nil)
			for _, c := range []net.Conn{s.guestOut, s.guestErr} {
				go func() {
					for {
						if _, err := c.Write(make([]byte, 10_000)); err != nil {
							return
						}
					}
				}()
			}
			go io.Copy(s.stdin, neverEnding{})
			io.CopyN(io.Discard, s.stdout, 1<<20)
			io.CopyN(io.Discard, s.guestIn, 1<<20)
		}},
		{"guest gone", func(t *testing.T, s *streams) {
			s.attach(t, nil)
			for _, c := range []net.Conn{s.guestIn, s.guestOut, s.guestErr} {
				c.Close()
			}
		}},
		{"closed", func(_ *testing.T, s *streams) { s.io.Close() }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			checkLeaks(t)
			ctx, _ := testContext(t)
			s := openStreams(t, ctx, false)
			tc.use(t, s)
			var wg sync.WaitGroup
			for range 3 {
				wg.Go(func() {
					if err := s.io.Close(); err != nil {
						t.Errorf("Close() = %v", err)
					}
				})
			}
			wg.Wait()
			// Everything still may be called.
			if err := s.io.CloseStdin(); err != nil {
				t.Errorf("CloseStdin() after Close = %v", err)
			}
			if err := s.io.Drain(ctx); err != nil {
				t.Errorf("Drain() after Close = %v", err)
			}
			host, guest := connPair(t)
			s.io.Attach(nil, host, nil)
			readEnd(t, "connection attached after Close", guest)
			if _, err := s.stdin.Write([]byte("x")); !errors.Is(err, unix.EPIPE) {
				t.Errorf("client's write to stdin after Close = %v; want EPIPE", err)
			}
			io.Copy(io.Discard, s.stderr) // ends
		})
	}
}

type neverEnding struct{}

func (neverEnding) Read(p []byte) (int, error) { return len(p), nil }

func TestCloseUnwantedConnection(t *testing.T) {
	checkLeaks(t)
	s, err := Open(t.Context(), Config{ID: "web"})
	if err != nil {
		t.Fatalf("Open() = %v", err)
	}
	host, guest := connPair(t)
	s.Attach(nil, host, nil)
	readEnd(t, "connection of a process without streams", guest)
	if err := errors.Join(s.Drain(t.Context()), s.CloseStdin(), s.Close()); err != nil {
		t.Errorf("Drain, CloseStdin, Close = %v", err)
	}
}
