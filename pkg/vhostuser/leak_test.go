package vhostuser_test

import (
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// held is what a process holds of what a Backend takes.
type held struct{ Goroutines, Descriptors, Mappings int }

func holding(t testing.TB) held {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return held{
		Goroutines:  runtime.NumGoroutine(),
		Descriptors: len(fds),
		Mappings:    strings.Count(string(maps), "memfd:vhosttest"),
	}
}

// waitFor polls for a condition that nothing announces.
func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %s within 10 s", what)
		}
	}
}

// noLeaks checks that f leaves nothing behind.
func noLeaks(t *testing.T, f func()) {
	t.Helper()
	before := holding(t)
	f()
	more := func() bool {
		now := holding(t)
		return now.Goroutines > before.Goroutines || now.Descriptors > before.Descriptors || now.Mappings > before.Mappings
	}
	end := time.Now().Add(10 * time.Second)
	for more() && time.Now().Before(end) {
		time.Sleep(time.Millisecond) // goroutines end after what ended them
	}
	if more() {
		t.Errorf("held before and after (-before +after):\n%s", cmp.Diff(before, holding(t)))
	}
}

func TestNoLeaks(t *testing.T) {
	// The poller's own descriptors appear with the first use.
	serveOnce(t, func(*serving) {})
	noLeaks(t, func() {
		for range 10 {
			serveOnce(t, func(s *serving) {
				s.start(t)
				s.echoed(t, 0, s.Queue(0).Add, "x")
			})
			serveOnce(t, func(s *serving) {
				s.start(t)
				if err := s.Stop(); err != nil {
					t.Error(err)
				}
			})
			serveOnce(t, func(s *serving) {
				s.start(t)
				s.Queue(0).SetAvailIndex(0x8000)
				s.Queue(0).ForceKick()
				s.wantEnd(t, "available index")
			})
		}
	})
}

// serveOnce runs f with a back end that has ended when it returns.
func serveOnce(t *testing.T, f func(*serving)) {
	t.Helper()
	s := serve(t)
	f(s)
	s.Machine.Close()
	s.wait(t)
	s.stop()
}
