package stdio

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// patience bounds what must happen in the end, on a machine however busy.
const patience = time.Minute

// patient is for loggers that end on their own.
var patient = func() timing {
	t := defaultTiming
	t.logger = loggerTiming{read: patience, exit: patience, term: 2 * patience, reap: patience}
	return t
}()

// TestMain runs this binary as a logger when a test's URI says so.
func TestMain(m *testing.M) {
	if len(os.Args) == 5 && os.Args[1] == "logger" {
		unix.Exit(runLogger(os.Args[2], os.Args[4])) // os.Exit waits a second with -race
	}
	os.Exit(m.Run())
}

// loggerURI names this binary as a logger.
func loggerURI(t *testing.T, scheme, mode, dir string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	q := url.Values{"logger": {mode}, "out": {dir}}
	return (&url.URL{Scheme: scheme, Path: self, RawQuery: q.Encode()}).String()
}

// runLogger is a logging binary of containerd's protocol.
func runLogger(mode, dir string) int {
	stdout, stderr, wait := os.NewFile(3, "stdout"), os.NewFile(4, "stderr"), os.NewFile(5, "wait")
	ready := func() {
		wait.Write([]byte{0})
		wait.Close()
	}
	store := func(name string, r io.Reader) {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			panic(err)
		}
		io.Copy(f, r)
		f.Close()
	}
	storeBoth := func() {
		var wg sync.WaitGroup
		wg.Go(func() { store("stdout", stdout) })
		wg.Go(func() { store("stderr", stderr) })
		wg.Wait()
	}
	hang := func() {
		for {
			time.Sleep(time.Hour)
		}
	}
	switch mode {
	case "crash": // before ready
		return 3
	case "mute": // never ready
		hang()
	case "silent": // ready by closing alone
		wait.Close()
		storeBoth()
	case "store":
		store("env", strings.NewReader(strings.Join(os.Environ(), "\n")))
		ready()
		storeBoth()
	case "die": // in the middle
		ready()
		stdout.Read(make([]byte, 1))
		return 4
	case "slow": // 40 KiB a second
		ready()
		go store("stderr", stderr)
		store("stdout", readerFunc(func(p []byte) (int, error) {
			time.Sleep(100 * time.Millisecond)
			return stdout.Read(p[:min(len(p), 4096)])
		}))
	case "idle": // reads nothing
		ready()
		hang()
	case "servant": // ends when told
		told := make(chan os.Signal, 1)
		signal.Notify(told, unix.SIGTERM)
		ready()
		storeBoth()
		<-told
		store("told", strings.NewReader("yes"))
	case "stubborn": // never ends
		signal.Ignore(unix.SIGTERM)
		ready()
		hang()
	}
	return 0
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// logged collects what is logged with the context it belongs to.
type logged struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func testContext(t testing.TB) (context.Context, *logged) {
	t.Helper()
	out := new(logged)
	l := logrus.New()
	l.SetOutput(out)
	l.SetLevel(logrus.DebugLevel)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return log.WithLogger(ctx, logrus.NewEntry(l)), out
}

// checkLeaks fails the test if it leaves goroutines or descriptors behind. It
// must be called first.
func checkLeaks(t testing.TB) {
	t.Helper()
	goroutines, fds := runtime.NumGoroutine(), openFDs(t)
	// The garbage collector would close what was forgotten.
	percent := debug.SetGCPercent(-1)
	t.Cleanup(func() {
		defer debug.SetGCPercent(percent)
		deadline := time.Now().Add(10 * time.Second)
		for runtime.NumGoroutine() > goroutines || len(newFDs(t, fds)) > 0 {
			if time.Now().After(deadline) {
				buf := make([]byte, 1<<20)
				t.Errorf("left behind: %d goroutines, descriptors %q\n%s", runtime.NumGoroutine()-goroutines,
					newFDs(t, fds), buf[:runtime.Stack(buf, true)])
				return
			}
			time.Sleep(time.Millisecond) // goroutines end without an event
		}
	})
}

func openFDs(t testing.TB) map[string]string {
	t.Helper()
	const dir = "/proc/self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	fds := make(map[string]string)
	for _, e := range entries {
		// The folder's own descriptor is gone again, and the runtime
		// keeps its poller for good.
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err == nil && !strings.Contains(target, "eventpoll") && !strings.Contains(target, "eventfd") {
			fds[e.Name()] = target
		}
	}
	return fds
}

func newFDs(t testing.TB, before map[string]string) []string {
	var found []string
	for fd, target := range openFDs(t) {
		if before[fd] != target {
			found = append(found, fd+" "+target)
		}
	}
	return found
}

// makeFIFO makes a FIFO and returns its path.
func makeFIFO(t testing.TB, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := unix.Mkfifo(path, 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// openReader opens a client's read end without waiting for a writer.
func openReader(t testing.TB, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func openWriter(t testing.TB, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// plain hides everything of a connection that Conn does not have.
type plain struct{ Conn }

// shortcut is a connection that moves its own bytes.
type shortcut struct {
	Conn
	used *bool
}

func (c shortcut) WriteTo(w io.Writer) (int64, error) {
	*c.used = true
	return io.Copy(w, plain{c.Conn})
}

func (c shortcut) ReadFrom(r io.Reader) (int64, error) {
	*c.used = true
	return io.Copy(plain{c.Conn}, r)
}

// connPair returns both ends of a stream connection.
func connPair(t testing.TB) (host Conn, guest *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return plain{ends[0]}, ends[1]
}

// streams is a process with all its streams, seen from both sides.
type streams struct {
	io *IO
	// The client's ends.
	stdin, stdout, stderr *os.File
	// The guest's ends.
	guestIn, guestOut, guestErr *net.UnixConn
}

// openStreams opens FIFOs for every stream, not yet attached.
func openStreams(t testing.TB, ctx context.Context, terminal bool) *streams {
	t.Helper()
	cfg := Config{Namespace: "ns", ID: "web", Stdin: makeFIFO(t, "in"), Stdout: makeFIFO(t, "out"), Terminal: terminal}
	s := &streams{stdout: openReader(t, cfg.Stdout)}
	if !terminal {
		cfg.Stderr = makeFIFO(t, "err")
		s.stderr = openReader(t, cfg.Stderr)
	}
	var err error
	if s.io, err = Open(ctx, cfg); err != nil {
		t.Fatalf("Open() = %v", err)
	}
	t.Cleanup(func() {
		if err := s.io.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
	s.stdin = openWriter(t, cfg.Stdin)
	return s
}

// attach connects what the streams want. wrap may replace the host's ends.
func (s *streams) attach(t testing.TB, wrap func(Conn) Conn) {
	t.Helper()
	if wrap == nil {
		wrap = func(c Conn) Conn { return c }
	}
	var hosts [3]Conn
	stdin, stdout, stderr := s.io.Wants()
	for i, st := range []struct {
		wanted bool
		guest  **net.UnixConn
	}{{stdin, &s.guestIn}, {stdout, &s.guestOut}, {stderr, &s.guestErr}} {
		if st.wanted {
			host, guest := connPair(t)
			hosts[i], *st.guest = wrap(host), guest
		}
	}
	s.io.Attach(hosts[0], hosts[1], hosts[2])
}

// randomBytes returns n bytes that do not repeat.
func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

// sameBytes compares contents that are too long to print.
func sameBytes(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if g, w := sha256.Sum256(got), sha256.Sum256(want); g != w {
		t.Errorf("%s: got %d bytes, sha256 %x; want %d bytes, %x", what, len(got), g[:4], len(want), w[:4])
	}
}

// readAll collects r until it ends.
func readAll(r io.Reader) <-chan []byte {
	c := make(chan []byte, 1)
	go func() {
		b, err := io.ReadAll(r)
		if err != nil {
			b = fmt.Appendf(b, " [%v]", err)
		}
		c <- b
	}()
	return c
}

// eventually waits for what has no event.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not after %v", what, patience)
		}
	}
}

// await returns the next value of c.
func await[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("%s: nothing after %v", what, patience)
		panic("unreachable")
	}
}

// silent fails if r yields anything, even its end, within a moment.
func silent(t testing.TB, what string, r interface {
	io.Reader
	SetReadDeadline(time.Time) error
}) {
	t.Helper()
	r.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	n, err := r.Read(make([]byte, 1))
	if n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s: Read() = %d, %v; want it to wait", what, n, err)
	}
	r.SetReadDeadline(time.Time{})
}

// readString reads exactly as much as want has and compares.
func readString(t testing.TB, what string, r io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	n, err := io.ReadFull(r, got)
	if err != nil || string(got) != want {
		t.Fatalf("%s: read %q, %v; want %q", what, got[:n], err, want)
	}
}

// readEnd fails unless r has ended.
func readEnd(t testing.TB, what string, r io.Reader) {
	t.Helper()
	n, err := r.Read(make([]byte, 1))
	if n != 0 || err != io.EOF {
		t.Fatalf("%s: Read() = %d, %v; want its end", what, n, err)
	}
}
