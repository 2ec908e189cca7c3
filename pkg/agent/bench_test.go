package agent_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/pkg/vsock"
)

// BenchmarkBoot measures from the VMM's exec to the agent's Hello, and on to its
// first answer to a request; what of it is the agent's, since the kernel has
// started it; and the VMM's processor time until Hello, which a busy machine
// distorts less.
//
// VMRT_BENCH_GUESTS names more folders of guest files, separated by colons, for
// comparison: their machines take turns with those of this tree.
func BenchmarkBoot(b *testing.B) {
	roots := []string{""}
	if more := os.Getenv("VMRT_BENCH_GUESTS"); more != "" {
		roots = append(roots, strings.Split(more, ":")...)
	}
	for _, kind := range []string{guest.Tuned, guest.Stock} {
		b.Run(kind, func(b *testing.B) {
			boots := make([]boots, len(roots))
			for b.Loop() {
				for i, root := range roots {
					boots[i].add(b, bootVM(b, vmSpec{root: root, kind: kind, cmdline: []string{"vmrt.debug"}, asBuilt: true}))
				}
			}
			b.ReportMetric(0, "ns/op")
			for i, root := range roots {
				boots[i].report(b, root)
			}
		})
	}
}

// boots are what was measured of several boots.
type boots struct{ ready, cpu, answered, own []time.Duration }

func (m *boots) add(b *testing.B, v *virtual) {
	m.ready = append(m.ready, v.ready)
	m.cpu = append(m.cpu, v.cpu)
	if _, err := connect(b, v).agent.Clock(testContext(b), &api.ClockRequest{}); err != nil {
		b.Fatal(err)
	}
	m.answered = append(m.answered, time.Since(v.begin))
	phases := awaitPhases(b, v)
	b.Log(v.ready, phases)
	var start, hello float64
	for _, f := range strings.Fields(phases) {
		fmt.Sscanf(f, "start=%f", &start)
		fmt.Sscanf(f, "hello=%f", &hello)
	}
	m.own = append(m.own, time.Duration((hello-start)*float64(time.Millisecond)))
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := v.vm.Kill(ctx); err != nil {
		b.Error(err)
	}
}

func (m *boots) report(b *testing.B, root string) {
	if root != "" {
		root = "-of-" + root
	}
	for name, d := range map[string][]time.Duration{
		"ready": m.ready, "cpu": m.cpu, "answered": m.answered, "agent": m.own,
	} {
		b.ReportMetric(median(d).Seconds()*1000, name+"-ms"+root)
		b.ReportMetric(slices.Min(d).Seconds()*1000, name+"-min-ms"+root)
	}
}

func median(d []time.Duration) time.Duration {
	d = slices.Sorted(slices.Values(d))
	return d[len(d)/2]
}

// awaitPhases returns the agent's line of boot phases.
func awaitPhases(t testing.TB, v *virtual) string {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		for _, line := range strings.Split(v.console.text(), "\n") {
			if strings.Contains(line, "boot phases") {
				return line
			}
		}
	}
	t.Fatalf("no boot phases on the console:\n%s", v.console.text())
	return ""
}

// BenchmarkStreams compares stdio through the agent with bare vsock
// connections of the same machine.
func BenchmarkStreams(b *testing.B) {
	v := bootVM(b, vmSpec{kind: guest.Tuned, programs: map[string]string{"blast": buildBlast(b)}})
	ctr := connect(b, v).running(b)
	for _, bm := range []struct {
		name string
		run  func(*transfer)
	}{
		{"out/vsock", (*transfer).receiveRaw},
		{"out/stdout", (*transfer).receiveStdout},
		{"in/vsock", (*transfer).sendRaw},
		{"in/stdin", (*transfer).sendStdin},
	} {
		b.Run(bm.name, func(b *testing.B) {
			const size = 64 << 20
			tr := &transfer{B: b, v: v, ctr: ctr, size: size}
			b.SetBytes(size)
			n := 0
			for b.Loop() {
				b.StopTimer()
				bm.run(tr)
				b.StartTimer()
				n++
			}
			// Wall-clock time is at the mercy of a busy machine; this less.
			b.ReportMetric(tr.cpu.Seconds()*1000/float64(n*size>>20), "vmm-ms/MiB")
		})
	}
}

// transfer is one direction of BenchmarkStreams.
type transfer struct {
	*testing.B
	v    *virtual
	ctr  *container
	size int
	cpu  time.Duration // of the VMM
}

// timed runs what the benchmark is about.
func (tr *transfer) timed(f func()) {
	before := cpuTime(tr, tr.v.vm.Pid())
	tr.StartTimer()
	f()
	tr.StopTimer()
	tr.cpu += cpuTime(tr, tr.v.vm.Pid()) - before
}

// blast starts the program in the container.
func (tr *transfer) blast(s stdio, mode, where string) string {
	id := tr.ctr.exec(s, []string{"blast", mode, where, fmt.Sprint(tr.size)})
	tr.ctr.start(id)
	return id
}

func (tr *transfer) end(id string) {
	if status := tr.ctr.wait(id); status != 0 {
		tr.Fatalf("blast's status = %d; want 0", status)
	}
	tr.ctr.delete(id)
}

// raw starts blast with a connection of its own.
func (tr *transfer) raw(mode string) (vsock.Conn, string) {
	id := tr.blast(stdio{}, mode, fmt.Sprint(tr.v.transport.HostPort()))
	conn, err := tr.v.transport.Accept(testContext(tr))
	if err != nil {
		tr.Fatal(err)
	}
	return conn, id
}

func (tr *transfer) receive(r io.Reader) {
	tr.timed(func() {
		if n, err := io.Copy(io.Discard, r); n != int64(tr.size) || err != nil {
			tr.Fatalf("received %d bytes, %v; want %d", n, err, tr.size)
		}
	})
}

func (tr *transfer) receiveRaw() {
	conn, id := tr.raw("write")
	defer conn.Close()
	tr.receive(conn)
	tr.end(id)
}

func (tr *transfer) receiveStdout() {
	url, out := tr.ctr.stream(tr)
	defer out.Close()
	id := tr.blast(stdio{out: url}, "write", "stdio")
	tr.receive(out)
	tr.end(id)
}

func (tr *transfer) sendRaw() {
	conn, id := tr.raw("read")
	defer conn.Close()
	tr.timed(func() {
		conn.Write(make([]byte, tr.size))
		conn.CloseWrite()
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			tr.Fatal(err)
		}
	})
	tr.end(id)
}

func (tr *transfer) sendStdin() {
	url, in := tr.ctr.stream(tr)
	defer in.Close()
	id := tr.blast(stdio{in: url}, "read", "stdio")
	tr.timed(func() {
		in.Write(make([]byte, tr.size))
		in.CloseWrite()
		tr.ctr.wait(id)
	})
	tr.end(id)
}

func buildBlast(b *testing.B) string {
	b.Helper()
	program, err := build("blast", "./testdata/blast")
	if err != nil {
		b.Fatal(err)
	}
	return program
}

// cpuTime returns what a process has used so far, in all of its threads that
// live.
func cpuTime(t testing.TB, pid int) (total time.Duration) {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || threads == nil {
		t.Fatalf("threads of process %d: %v, %v", pid, threads, err)
	}
	for _, thread := range threads {
		stat, err := os.ReadFile(thread)
		if os.IsNotExist(err) {
			continue // it has just ended
		}
		// The first field is nanoseconds on a processor.
		ns, _, _ := strings.Cut(string(stat), " ")
		n, perr := strconv.ParseInt(ns, 10, 64)
		if err != nil || perr != nil {
			t.Fatalf("%s: %q, %v, %v", thread, stat, err, perr)
		}
		total += time.Duration(n)
	}
	return total
}

// BenchmarkFootprint reports what the agent itself costs a machine: after a
// container has started, and after many execs. Its program is in memory in any
// case, as a file of the initramfs; the anonymous part comes on top.
func BenchmarkFootprint(b *testing.B) {
	v := bootVM(b, vmSpec{kind: guest.Tuned})
	ctr := connect(b, v).running(b, func(s *specs.Spec) { s.Linux.Namespaces = s.Linux.Namespaces[1:] })
	for b.Loop() {
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(agentKiB(b, ctr, "Rss"), "KiB-rss")
	b.ReportMetric(agentKiB(b, ctr, "Anonymous"), "KiB-anonymous")
	for range 20 {
		ctr.output("true")
	}
	b.ReportMetric(agentKiB(b, ctr, "Anonymous"), "KiB-anonymous-after-20-execs")
}

// agentKiB returns one line of the agent's memory map.
func agentKiB(t testing.TB, ctr *container, field string) (kib float64) {
	t.Helper()
	out, _ := ctr.output("grep", "^"+field+":", "/proc/1/smaps_rollup")
	if _, err := fmt.Sscanf(out, field+": %f kB", &kib); err != nil {
		t.Fatalf("%s in smaps_rollup = %q: %v", field, out, err)
	}
	return kib
}
