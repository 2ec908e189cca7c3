package conformance

import (
	"fmt"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// The guest's clock stays within 50 ms of the host's.
func TestClock(t *testing.T) {
	s := newShim(t, args("sleep", "1000"))
	s.mustCreate(nil, false)
	s.mustStart("")
	best := time.Hour
	for i := range 5 {
		off, bracket := s.clockOffset(fmt.Sprintf("clock%d", i))
		t.Logf("guest clock is off by at least %v, read within %v", off, bracket)
		best = min(best, off)
	}
	if best > 50*time.Millisecond {
		t.Errorf("guest clock is off by at least %v; want at most 50ms", best)
	}
}

// A clock that is wrong is set right within a few seconds, however it came to
// be so.
func TestClockIsCorrected(t *testing.T) {
	s := newShim(t, options{spec: func(spec *specs.Spec) {
		sleeper(spec)
		privileged(spec)
	}})
	s.mustCreate(nil, false)
	s.mustStart("")
	const wrong = 1000 * time.Second
	s.wantShell("set", fmt.Sprintf("date -s @$(($(date +%%s) + %d)) > /dev/null", int(wrong.Seconds())), "")
	begin := time.Now()
	for i := 0; ; i++ {
		off, _ := s.clockOffset(fmt.Sprintf("clock%d", i))
		if off <= 50*time.Millisecond {
			t.Logf("right after %v", time.Since(begin))
			return
		}
		if time.Since(begin) > 30*time.Second {
			t.Fatalf("guest clock is off by at least %v after %v; want it corrected", off, time.Since(begin))
		}
		time.Sleep(500 * time.Millisecond)
	}
}

// clockOffset has a container read its clock between two readings of the
// host's. It returns how far outside of them the reading is, and how far apart
// they are.
func (s *shim) clockOffset(id string) (off, bracket time.Duration) {
	s.t.Helper()
	st := newStreams(s.t, true, false)
	// busybox's date has no fractions, its adjtimex has.
	const read = `read x; adjtimex | awk '/tv_sec/ {s=$2} /tv_usec/ {printf "%d %d\n", s, $2}'`
	if err := s.addExec(id, st, false, "sh", "-c", read); err != nil {
		s.t.Fatal(err)
	}
	s.mustStart(id)
	before := time.Now()
	fmt.Fprintln(st.in)
	st.out.waitFor(s.t, "\n")
	after := time.Now()
	s.wait(id)
	s.delete(id)
	var sec, fraction int64
	if _, err := fmt.Sscan(st.out.String(), &sec, &fraction); err != nil {
		s.t.Fatalf("the guest's clock reads %q: %v", st.out.String(), err)
	}
	guest := time.Unix(sec, fraction*1000)
	if fraction >= 1e6 {
		// adjtimex(2): nanoseconds, once STA_NANO was set. A fraction of less
		// than a millisecond is taken for microseconds; the best of several
		// readings counts.
		guest = time.Unix(sec, fraction)
	}
	return max(before.Sub(guest), guest.Sub(after), 0), after.Sub(before)
}
