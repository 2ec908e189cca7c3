package conformance

import (
	"fmt"
	"regexp"
	"sort"
	"strings"
	"testing"
	"time"
)

// samples are the durations of one phase over all runs.
type samples map[string][]time.Duration

func (s samples) add(phase string, d time.Duration) { s[phase] = append(s[phase], d) }

func (s samples) median(phase string) time.Duration {
	d := s[phase]
	if len(d) == 0 {
		return 0
	}
	sort.Slice(d, func(i, j int) bool { return d[i] < d[j] })
	return d[len(d)/2]
}

// BenchmarkLifecycle prints the medians of the phases of a container's life in
// milliseconds. "booted" is the virtual machine's own share: from the VMM's
// exec to the agent being ready.
func BenchmarkLifecycle(b *testing.B) {
	all := samples{}
	for b.Loop() {
		s := newShim(b, args("true"))
		lap := func(phase string, f func()) {
			start := time.Now()
			f()
			all.add(phase, time.Since(start))
		}
		st := newStreams(b, false, false)
		lap("create", func() { s.mustCreate(st, false) })
		lap("start", func() { s.mustStart("") })
		lap("wait", func() { s.wait("") })
		lap("exec-free delete", func() { s.delete("") })
		lap("shutdown", s.end)
		for _, phase := range []string{"prepared", "booted", "connected"} {
			all.add(phase, s.logged(phase))
		}
	}
	for phase := range all {
		b.ReportMetric(float64(all.median(phase).Microseconds())/1000, strings.ReplaceAll(phase, " ", "-")+"-ms")
	}
	b.ReportMetric(0, "ns/op")
}

// logged returns a duration that the shim logged at the end of the boot.
func (s *shim) logged(field string) time.Duration {
	s.t.Helper()
	m := regexp.MustCompile(field + `=(\S+)`).FindStringSubmatch(s.log.String())
	if m == nil {
		s.t.Fatalf("the shim's log has no %s", field)
	}
	d, err := time.ParseDuration(m[1])
	if err != nil {
		s.t.Fatal(err)
	}
	return d
}

// BenchmarkExec prints the time of `true` run as an exec, from Exec to Delete.
func BenchmarkExec(b *testing.B) {
	s := newShim(b, args("sleep", "10000"))
	s.mustCreate(nil, false)
	s.mustStart("")
	i := 0
	for b.Loop() {
		i++
		s.exec(fmt.Sprintf("b%d", i), "true")
	}
}

// BenchmarkStdout prints the throughput of a process's output to a client's
// FIFO. BenchmarkStdio of pkg/agent compares it with bare vsock in one machine.
func BenchmarkStdout(b *testing.B) {
	const size = 64 << 20
	s := newShim(b, args("sleep", "10000"))
	s.mustCreate(nil, false)
	s.mustStart("")
	b.SetBytes(size)
	i := 0
	for b.Loop() {
		i++
		id := fmt.Sprintf("b%d", i)
		st := newStreams(b, false, false)
		if err := s.addExec(id, st, false, "dd", "if=/dev/zero", "bs=64k", fmt.Sprintf("count=%d", size/(64<<10))); err != nil {
			b.Fatal(err)
		}
		s.mustStart(id)
		<-st.out.done
		s.wait(id)
		s.delete(id)
	}
}

// BenchmarkStdin prints the throughput from a client's FIFO to a process.
func BenchmarkStdin(b *testing.B) {
	const size = 64 << 20
	s := newShim(b, args("sleep", "10000"))
	s.mustCreate(nil, false)
	s.mustStart("")
	b.SetBytes(size)
	data := make([]byte, 1<<20)
	i := 0
	for b.Loop() {
		i++
		id := fmt.Sprintf("b%d", i)
		st := newStreams(b, true, false)
		if err := s.addExec(id, st, false, "dd", "of=/dev/null", "bs=64k"); err != nil {
			b.Fatal(err)
		}
		s.mustStart(id)
		for sent := 0; sent < size; sent += len(data) {
			if _, err := st.in.Write(data); err != nil {
				b.Fatal(err)
			}
		}
		st.in.Close()
		s.closeStdin(id)
		s.wait(id)
		s.delete(id)
	}
}
