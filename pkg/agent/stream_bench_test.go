package agent_test

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/pkg/stdio"
	"github.com/vmrt/vmrt/pkg/vsock"
)

// BenchmarkStdio compares, in one machine and in turns, a container's process
// that moves bytes over a vsock connection of its own with one whose stdio is
// moved: "stream" by the agent alone, "client" all the way to a client's FIFO.
// The metrics are medians in MB/s and what part of the bare connection's speed
// the client gets: the median of the turns, since the speed of a busy machine is
// another one in each.
func BenchmarkStdio(b *testing.B) {
	v := bootVM(b, vmSpec{kind: guest.Tuned, programs: map[string]string{"blast": buildBlast(b)}})
	tr := &transfer{B: b, v: v, ctr: connect(b, v).running(b), size: 32 << 20}
	ways := []struct {
		name string
		run  func(*transfer)
	}{
		{"out-stream", (*transfer).receiveStream},
		{"out-vsock", (*transfer).receiveRaw},
		{"out-client", (*transfer).receiveClient},
		{"in-stream", (*transfer).sendStream},
		{"in-vsock", (*transfer).sendRaw},
		{"in-client", (*transfer).sendClient},
	}
	wall, cpu := map[string][]time.Duration{}, map[string][]time.Duration{}
	for b.Loop() {
		for _, w := range ways {
			w.run(tr)
			wall[w.name] = append(wall[w.name], tr.wall)
			cpu[w.name] = append(cpu[w.name], tr.cpu)
		}
	}
	b.ReportMetric(0, "ns/op")
	for _, w := range ways {
		mbps := float64(tr.size) / 1e6 / median(wall[w.name]).Seconds()
		b.ReportMetric(mbps, w.name+"-MB/s")
		// Wall-clock time is at the mercy of a busy machine; this less.
		b.Logf("%-12s%8.0f MB/s%8.2f ms of the VMM a MiB", w.name, mbps, median(cpu[w.name]).Seconds()*1000/float64(tr.size>>20))
	}
	for _, dir := range []string{"out", "in"} {
		var parts []float64
		for i, bare := range wall[dir+"-vsock"] {
			parts = append(parts, bare.Seconds()/wall[dir+"-client"][i].Seconds())
		}
		b.ReportMetric(median(parts), dir+"-client/vsock")
	}
}

// transfer is one transfer of BenchmarkStdio, and how long it took.
type transfer struct {
	*testing.B
	v    *virtual
	ctr  *container
	size int
	wall time.Duration
	cpu  time.Duration // of the VMM
}

// timed runs what the benchmark is about.
func (tr *transfer) timed(f func()) {
	cpu, begin := cpuTime(tr, tr.v.vm.Pid()), time.Now()
	f()
	tr.wall, tr.cpu = time.Since(begin), cpuTime(tr, tr.v.vm.Pid())-cpu
}

// blast starts the program in the container.
func (tr *transfer) blast(s streams, mode, where string) string {
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
	id := tr.blast(streams{}, mode, fmt.Sprint(tr.v.transport.HostPort()))
	conn, err := tr.v.transport.Accept(testContext(tr))
	if err != nil {
		tr.Fatal(err)
	}
	return conn, id
}

// ready waits until the program is about to move its bytes.
func (tr *transfer) ready(r io.Reader) {
	if _, err := io.ReadFull(r, make([]byte, 1)); err != nil {
		tr.Fatalf("the program does not say that it is ready: %v", err)
	}
}

// receive reads everything, in pieces as containerd's client does.
func (tr *transfer) receive(r io.Reader) {
	tr.ready(r)
	tr.timed(func() {
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, make([]byte, 32<<10))
		if n != int64(tr.size) || err != nil {
			tr.Fatalf("received %d bytes, %v; want %d", n, err, tr.size)
		}
	})
}

// send writes everything, in such pieces, ends it, and waits until the program
// says in r that it has come to the end.
func (tr *transfer) send(w io.Writer, end func(), r io.Reader) {
	tr.ready(r)
	piece := make([]byte, 32<<10)
	tr.timed(func() {
		for left := tr.size; left > 0; left -= len(piece) {
			if _, err := w.Write(piece); err != nil {
				tr.Fatal(err)
			}
		}
		end()
		if _, err := io.ReadFull(r, piece[:1]); err != nil {
			tr.Fatalf("the program does not say that all is there: %v", err)
		}
	})
}

func (tr *transfer) receiveRaw() {
	conn, id := tr.raw("write")
	defer conn.Close()
	tr.receive(conn)
	tr.end(id)
}

func (tr *transfer) receiveStream() {
	url, out := tr.ctr.stream(tr)
	defer out.Close()
	id := tr.blast(streams{out: url}, "write", "stdio")
	tr.receive(out)
	tr.end(id)
}

func (tr *transfer) receiveClient() {
	fifo, client := tr.fifo(os.O_RDONLY)
	defer client.Close()
	io, err := stdio.Open(testContext(tr), stdio.Config{ID: "bench", Stdout: fifo})
	if err != nil {
		tr.Fatal(err)
	}
	defer io.Close()
	url, out := tr.ctr.stream(tr)
	io.Attach(nil, out, nil)
	id := tr.blast(streams{out: url}, "write", "stdio")
	tr.receive(client)
	tr.end(id)
}

func (tr *transfer) sendRaw() {
	conn, id := tr.raw("read")
	defer conn.Close()
	tr.send(conn, func() { conn.CloseWrite() }, conn)
	tr.end(id)
}

func (tr *transfer) sendStream() {
	inURL, in := tr.ctr.stream(tr)
	defer in.Close()
	outURL, out := tr.ctr.stream(tr)
	defer out.Close()
	id := tr.blast(streams{in: inURL, out: outURL}, "read", "stdio")
	tr.send(in, func() { in.CloseWrite() }, out)
	tr.end(id)
}

func (tr *transfer) sendClient() {
	fifo, client := tr.fifo(os.O_RDWR) // to open it without a reader
	defer client.Close()
	io, err := stdio.Open(testContext(tr), stdio.Config{ID: "bench", Stdin: fifo})
	if err != nil {
		tr.Fatal(err)
	}
	defer io.Close()
	inURL, in := tr.ctr.stream(tr)
	io.Attach(in, nil, nil)
	outURL, out := tr.ctr.stream(tr)
	defer out.Close()
	id := tr.blast(streams{in: inURL, out: outURL}, "read", "stdio")
	tr.send(client, func() {
		client.Close()
		io.CloseStdin()
	}, out)
	tr.end(id)
}

// fifo makes a FIFO and opens the client's end.
func (tr *transfer) fifo(flag int) (string, *os.File) {
	path := filepath.Join(tr.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		tr.Fatal(err)
	}
	f, err := os.OpenFile(path, flag|unix.O_NONBLOCK, 0)
	if err != nil {
		tr.Fatal(err)
	}
	return path, f
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
