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

	"golang.org/x/sys/unix"
)

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
