package stdio

import (
	"context"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// openLogged opens streams that go to this binary in the given mode.
func openLogged(t *testing.T, ctx context.Context, cfg Config, scheme, mode string, tm timing) (*streams, string) {
	t.Helper()
	dir := t.TempDir()
	cfg.Namespace, cfg.ID = "ns", "web"
	cfg.Stdout = loggerURI(t, scheme, mode, dir)
	cfg.Stderr = cfg.Stdout
	s := new(streams)
	var err error
	if s.io, err = open(ctx, cfg, tm); err != nil {
		t.Fatalf("Open() = %v", err)
	}
	t.Cleanup(func() { s.io.Close() })
	s.attach(t, nil)
	return s, dir
}

func stored(t *testing.T, dir, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestLogger(t *testing.T) {
	for _, tc := range []struct{ name, scheme, mode string }{
		{"binary", "binary", "store"},
		{"binary-v2", "binary-v2", "store"},
		{"binary that only closes its ready pipe", "binary", "silent"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			checkLeaks(t)
			ctx, logged := testContext(t)
			s, dir := openLogged(t, ctx, Config{}, tc.scheme, tc.mode, patient)
			out, errs := randomBytes(1<<20), randomBytes(300_000)
			go func() {
				s.guestErr.Write(errs)
				s.guestErr.Close()
			}()
			s.guestOut.Write(out)
			s.guestOut.Close()
			if err := s.io.Drain(ctx); err != nil {
				t.Errorf("Drain() = %v", err)
			}
			if err := s.io.Close(); err != nil {
				t.Errorf("Close() = %v", err)
			}
			sameBytes(t, "stdout", []byte(stored(t, dir, "stdout")), out)
			sameBytes(t, "stderr", []byte(stored(t, dir, "stderr")), errs)
			if tc.mode == "store" {
				if diff := cmp.Diff("CONTAINER_ID=web\nCONTAINER_NAMESPACE=ns", stored(t, dir, "env")); diff != "" {
					t.Errorf("environment (-want +got):\n%s", diff)
				}
			}
			if got := logged.String(); !strings.Contains(got, `status="exit status 0"`) {
				t.Errorf("log = %q; want the exit status in it", got)
			}
		})
	}
}

func TestLoggerTerminal(t *testing.T) {
	checkLeaks(t)
	ctx, _ := testContext(t)
	s, dir := openLogged(t, ctx, Config{Terminal: true}, "binary", "store", patient)
	s.guestOut.Write([]byte("on the terminal"))
	s.guestOut.Close()
	if err := s.io.Drain(ctx); err != nil {
		t.Errorf("Drain() = %v", err)
	}
	if err := s.io.Close(); err != nil {
		t.Errorf("Close() = %v", err)
	}
	if got := stored(t, dir, "stdout") + stored(t, dir, "stderr"); got != "on the terminal" {
		t.Errorf("stored %q; want %q", got, "on the terminal")
	}
}

func TestLoggerNotReady(t *testing.T) {
	for _, tc := range []struct{ name, scheme, mode, want string }{
		{"crash", "binary-v2", "crash", "did not call ready (it may have crashed or exited prematurely): exit status 3"},
		{"silent", "binary-v2", "silent", "did not call ready (it may have crashed or exited prematurely)"},
		{"late", "binary", "mute", "not ready: context deadline exceeded"},
		{"late v2", "binary-v2", "mute", "not ready: context deadline exceeded"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			checkLeaks(t)
			ctx, _ := testContext(t)
			if tc.mode == "mute" {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 300*time.Millisecond)
				defer cancel()
			}
			uri := loggerURI(t, tc.scheme, tc.mode, t.TempDir())
			_, err := open(ctx, Config{Namespace: "ns", ID: "web", Stdin: makeFIFO(t, "in"), Stdout: uri}, patient)
			u, _ := url.Parse(uri)
			want := "start logger " + u.Path + " of web: " + tc.want
			if err == nil || err.Error() != want {
				t.Errorf("Open() = %v; want %s", err, want)
			}
		})
	}
}

// A logger that has died takes its bytes with it, but not the process. The
// first version of the protocol does not even notice an early crash.
func TestLoggerDies(t *testing.T) {
	for _, tc := range []struct{ name, scheme, mode, want string }{
		{"before ready", "binary", "crash", "exit status 3"},
		{"in the middle", "binary-v2", "die", "exit status 4"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			checkLeaks(t)
			ctx, logged := testContext(t)
			s, _ := openLogged(t, ctx, Config{}, tc.scheme, tc.mode, patient)
			s.guestOut.SetWriteDeadline(time.Now().Add(patience))
			if _, err := s.guestOut.Write(make([]byte, 4<<20)); err != nil {
				t.Errorf("guest's write = %v; want it dropped", err)
			}
			s.guestOut.Close()
			s.guestErr.Close()
			if err := s.io.Drain(ctx); err != nil {
				t.Errorf("Drain() = %v", err)
			}
			if err := s.io.Close(); err == nil || !strings.HasSuffix(err.Error(), tc.want) {
				t.Errorf("Close() = %v; want %s", err, tc.want)
			}
			for _, want := range []string{`level=warning msg="logger `, `status="` + tc.want, "broken pipe", "bytes of stdout dropped"} {
				if got := logged.String(); !strings.Contains(got, want) {
					t.Errorf("log = %q; want %q in it", got, want)
				}
			}
		})
	}
}

// Nothing is lost with a logger that SIGTERM would end before it has read all.
func TestLoggerSlow(t *testing.T) {
	checkLeaks(t)
	ctx, _ := testContext(t)
	tm := patient
	tm.logger.exit = time.Second
	s, dir := openLogged(t, ctx, Config{}, "binary-v2", "slow", tm)
	data := randomBytes(70_000) // for 1.7 s
	go func() {
		s.guestOut.Write(data)
		s.guestOut.Close()
		s.guestErr.Close()
	}()
	if err := s.io.Drain(ctx); err != nil {
		t.Errorf("Drain() = %v", err)
	}
	if err := s.io.Close(); err != nil {
		t.Errorf("Close() = %v", err)
	}
	sameBytes(t, "stdout", []byte(stored(t, dir, "stdout")), data)
}

// A logger that waits for SIGTERM gets one: after a while, or at once if it can
// have nothing to store.
func TestLoggerTold(t *testing.T) {
	for _, tc := range []struct {
		name, output         string
		exit, atLeast, below time.Duration
	}{
		{"output", "text", 300 * time.Millisecond, 300 * time.Millisecond, patience},
		{"no output", "", patience, 0, patience},
	} {
		t.Run(tc.name, func(t *testing.T) {
			checkLeaks(t)
			ctx, _ := testContext(t)
			tm := patient
			tm.logger.exit = tc.exit
			s, dir := openLogged(t, ctx, Config{}, "binary-v2", "servant", tm)
			begin := time.Now()
			s.guestOut.Write([]byte(tc.output))
			s.guestOut.Close()
			s.guestErr.Close()
			if err := s.io.Drain(ctx); err != nil {
				t.Errorf("Drain() = %v", err)
			}
			if err := s.io.Close(); err != nil {
				t.Errorf("Close() = %v", err)
			}
			if took := time.Since(begin); took < tc.atLeast || took >= tc.below {
				t.Errorf("Drain() and Close() took %v; want %v to %v", took, tc.atLeast, tc.below)
			}
			if got := stored(t, dir, "told"); got != "yes" {
				t.Errorf("logger was told %q; want %q", got, "yes")
			}
			if got := stored(t, dir, "stdout"); got != tc.output {
				t.Errorf("logger stored %q; want %q", got, tc.output)
			}
		})
	}
}

// A logger that a plain SIGTERM ended is as good as one that has exited.
func TestLoggerTerminated(t *testing.T) {
	checkLeaks(t)
	ctx, logged := testContext(t)
	tm := patient
	tm.logger.exit = 10 * time.Millisecond
	s, _ := openLogged(t, ctx, Config{}, "binary-v2", "idle", tm)
	// Nobody drains: what is under way is given up.
	s.guestOut.Write(make([]byte, 4<<10))
	if err := s.io.Close(); err != nil {
		t.Errorf("Close() = %v", err)
	}
	if got := logged.String(); !strings.Contains(got, "has ended as told") {
		t.Errorf("log = %q; want the requested end in it", got)
	}
}

func TestLoggerNeverEnds(t *testing.T) {
	checkLeaks(t)
	ctx, logged := testContext(t)
	tm := patient
	tm.logger.exit, tm.logger.term = 10*time.Millisecond, 200*time.Millisecond
	s, _ := openLogged(t, ctx, Config{}, "binary-v2", "stubborn", tm)
	s.guestOut.Write([]byte("never read"))
	s.guestOut.Close()
	s.guestErr.Close()
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if err := s.io.Drain(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Drain() of what the logger does not read = %v; want a deadline exceeded", err)
	}
	begin := time.Now()
	err := s.io.Close()
	if err == nil || !strings.HasSuffix(err.Error(), "killed: still running 200ms after its input ended") {
		t.Errorf("Close() = %v; want it killed", err)
	}
	if took := time.Since(begin); took < 200*time.Millisecond || took > patience {
		t.Errorf("Close() took %v; want at least 200ms", took)
	}
	if got := logged.String(); !strings.Contains(got, `status="signal: killed"`) {
		t.Errorf("log = %q; want the exit status in it", got)
	}
}

func TestLoggerArgs(t *testing.T) {
	for _, tc := range []struct {
		query string
		want  []string
	}{
		{"", nil},
		{"id=1", []string{"id", "1"}},
		{"z=1&a=2", []string{"z", "1", "a", "2"}},
		{"a=1&b=2&a=3", []string{"a", "1", "b", "2"}},
		{"flag", []string{"flag", ""}},
		{"--path=%2Fvar%2Flog%20x&%2Da=+", []string{"--path", "/var/log x", "-a", " "}},
		{"a=1&&b=%zz&c=2", []string{"a", "1", "c", "2"}},
	} {
		u := &url.URL{Scheme: "binary", Path: "/x", RawQuery: tc.query}
		if diff := cmp.Diff(tc.want, loggerArgs(u)); diff != "" {
			t.Errorf("loggerArgs(%q) (-want +got):\n%s", tc.query, diff)
		}
	}
}
