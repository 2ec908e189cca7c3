package agent_test

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/pkg/vsock"
)

// BenchmarkBoot measures from the VMM's exec to the agent's Hello, and what of
// it is the agent's: since the kernel has started it.
func BenchmarkBoot(b *testing.B) {
	for _, kind := range []string{guest.Tuned, guest.Stock} {
		b.Run(kind, func(b *testing.B) {
			var ready, own []time.Duration
			for b.Loop() {
				v := bootVM(b, vmSpec{kind: kind, cmdline: []string{"vmrt.debug"}, asBuilt: true})
				ready = append(ready, v.ready)
				phases := awaitPhases(b, v)
				b.Log(v.ready, phases, strings.ReplaceAll(v.console.text(), "\n", " "))
				var start, hello float64
				for _, f := range strings.Fields(phases) {
					fmt.Sscanf(f, "start=%f", &start)
					fmt.Sscanf(f, "hello=%f", &hello)
				}
				own = append(own, time.Duration((hello-start)*float64(time.Millisecond)))
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(median(ready).Seconds()*1000, "ready-ms")
			b.ReportMetric(median(own).Seconds()*1000, "agent-ms")
		})
	}
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
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

// cpuTime returns what a process has used so far.
func cpuTime(t testing.TB, pid int) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	var ticks int64 // utime and stime, fields 14 and 15, in USER_HZ of 100
	for _, f := range strings.Fields(rest)[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
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
