package stdio

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/streaming"
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
		{"streams are not served", Config{Stdout: "ttrpc+unix:///run/s.sock?streaming_id=a"}, "open stdout ttrpc+unix:///run/s.sock?streaming_id=a of web: streams are not served: not implemented", errdefs.ErrNotImplemented},
		{"stream of another shim", Config{Stdin: "ttrpc+unix:///s?streaming_id=a", Streaming: streaming.New("/t")}, "open stdin ttrpc+unix:///s?streaming_id=a of web: not this shim's address, ttrpc+unix:///t: invalid argument", errdefs.ErrInvalidArgument},
		{"transport of a stream", Config{Stderr: "grpc+vsock://3:1?streaming_id=a", Streaming: streaming.New("/t")}, "open stderr grpc+vsock://3:1?streaming_id=a of web: transport grpc+vsock is not served, only ttrpc+unix is: not implemented", errdefs.ErrNotImplemented},
		{"one stream for two", Config{Stdout: "ttrpc+unix:///t?streaming_id=a", Stderr: "ttrpc+unix:///t?streaming_id=a", Streaming: streaming.New("/t")}, "open stderr ttrpc+unix:///t?streaming_id=a of web: stream a belongs to another process: already exists", errdefs.ErrAlreadyExists},
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
