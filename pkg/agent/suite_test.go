package agent_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmrt/vmrt/api"
)

// suite is what an agent must do on any machine.
func suite(t *testing.T, m machine) {
	for _, tt := range []struct {
		name string
		run  func(*testing.T, *client)
	}{
		{"Lifecycle", testLifecycle},
		{"Events", testEvents},
		{"Echo20MiB", testEcho},
		{"Pieces", testPieces},
		{"FileToOutput", testFileToOutput},
		{"Pipes", testPipes},
		{"BurstThenDelete", testBurst},
		{"Exec", testExec},
		{"ExecErrors", testExecErrors},
		{"CreateErrors", testCreateErrors},
		{"ParallelExecs", testParallelExecs},
		{"BackgroundChild", testBackgroundChild},
		{"HostDoesNotRead", testHostDoesNotRead},
		{"Terminal", testTerminal},
		{"StdinOfTerminalIsReleased", testTerminalStdin},
		{"StdinBeforeStart", testStdinBeforeStart},
		{"KillAndPids", testKillAndPids},
		{"PauseResume", testPauseResume},
		{"Stats", testStats},
		{"Requests", testRequests},
		{"Shutdown", testTaskShutdown},
		{"RemoveBundle", testRemoveBundle},
		{"NothingIsLeft", testNothingIsLeft},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.run(t, connect(t, m)) })
	}
}

// smoke is the part of the suite that a kernel could make fail.
func smoke(t *testing.T, m machine) {
	t.Run("Lifecycle", func(t *testing.T) { testLifecycle(t, connect(t, m)) })
	t.Run("Terminal", func(t *testing.T) { testTerminal(t, connect(t, m)) })
	t.Run("PauseResume", func(t *testing.T) { testPauseResume(t, connect(t, m)) })
	t.Run("Stats", func(t *testing.T) { testStats(t, connect(t, m)) })
}

func testLifecycle(t *testing.T, c *client) {
	url, out := c.stream(t)
	ctr := c.prepare(t, []string{"sh", "-c", "echo hello from $(hostname); exit 7"})
	ctr.mustCreate(streams{out: url})
	ctx := testContext(t)
	state := func() *taskapi.StateResponse {
		s, err := c.task.State(ctx, &taskapi.StateRequest{ID: ctr.id})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	if s := state(); s.Status != task.Status_CREATED || s.Pid == 0 || s.Stdout != url {
		t.Errorf("State() = %v; want it created, with a pid and stdout %s", s, url)
	}
	ctr.start("")
	if got := ctr.wait(""); got != 7 {
		t.Errorf("Wait() = %d; want 7", got)
	}
	if s := state(); s.Status != task.Status_STOPPED || s.ExitStatus != 7 || !s.ExitedAt.IsValid() {
		t.Errorf("State() = %v; want it stopped with status 7", s)
	}
	if b, err := io.ReadAll(out); string(b) != "hello from guest\n" || err != nil {
		t.Errorf("stdout = %q, %v; want %q", b, err, "hello from guest\n")
	}
	out.Close()
	if got := ctr.delete(""); got != 7 {
		t.Errorf("Delete() = %d; want 7", got)
	}
	if _, err := c.task.State(ctx, &taskapi.StateRequest{ID: ctr.id}); !isKind(err, errdefs.IsNotFound) {
		t.Errorf("State() after Delete = %v; want not found", err)
	}
}

func isKind(err error, is func(error) bool) bool { return err != nil && is(errgrpc.ToNative(err)) }

func testEvents(t *testing.T, c *client) {
	events := c.events(t)
	ctr := c.running(t)
	id := ctr.exec(streams{}, []string{"sh", "-c", "exit 3"})
	ctr.start(id)
	ctr.wait(id)
	ctr.delete(id)
	ctx := testContext(t)
	if _, err := c.task.Kill(ctx, &taskapi.KillRequest{ID: ctr.id, Signal: 9}); err != nil {
		t.Fatal(err)
	}
	ctr.wait("")
	ctr.delete("")
	var got []string
	var last uint64
	for len(got) == 0 || !strings.HasPrefix(got[len(got)-1], "delete") {
		e, ok := <-events
		if !ok {
			t.Fatalf("events = %v, then the stream's end", got)
		}
		if last != 0 && e.Seq != last+1 {
			t.Errorf("event number = %d; want %d", e.Seq, last+1)
		}
		last = e.Seq
		if s := describe(t, e, ctr.id); s != "" {
			got = append(got, s)
		}
	}
	want := []string{"create", "start", "exec added " + id, "exec started " + id, "exit " + id + " 3", "exit " + ctr.id + " 137", "delete 137"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}

// describe returns a line for an event of container id, empty for others.
func describe(t *testing.T, e *api.Event, id string) string {
	t.Helper()
	v, err := typeurl.UnmarshalAny(e.Event)
	if err != nil {
		t.Fatal(err)
	}
	if c, ok := v.(interface{ GetContainerID() string }); !ok || c.GetContainerID() != id {
		return ""
	}
	switch v := v.(type) {
	case *eventstypes.TaskCreate:
		return "create"
	case *eventstypes.TaskStart:
		return "start"
	case *eventstypes.TaskExecAdded:
		return "exec added " + v.ExecID
	case *eventstypes.TaskExecStarted:
		return "exec started " + v.ExecID
	case *eventstypes.TaskExit:
		return fmt.Sprintf("exit %s %d", v.ID, v.ExitStatus)
	case *eventstypes.TaskDelete:
		return fmt.Sprintf("delete %d", v.ExitStatus)
	}
	return fmt.Sprintf("%T", v)
}

func noise(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

// testEcho sends 20 MiB through stdin to stdout of a container's init.
func testEcho(t *testing.T, c *client) {
	const size = 20 << 20
	inURL, in := c.stream(t)
	outURL, out := c.stream(t)
	ctr := c.prepare(t, []string{"cat"})
	ctr.mustCreate(streams{in: inURL, out: outURL})
	ctr.start("")
	data := noise(size)
	begin := time.Now()
	go func() {
		in.Write(data)
		in.CloseWrite()
	}()
	sum := sha256.New()
	n, err := io.Copy(sum, out)
	t.Logf("%d MiB through cat in %v: %.0f MiB/s", size>>20, time.Since(begin), size/(1<<20)/time.Since(begin).Seconds())
	if n != size || err != nil || [32]byte(sum.Sum(nil)) != sha256.Sum256(data) {
		t.Errorf("cat's output = %d bytes, %v; want the %d sent", n, err, size)
	}
	if got := ctr.wait(""); got != 0 {
		t.Errorf("cat's status = %d; want 0 at the end of its input", got)
	}
}

// testBurst deletes a container as soon as it has ended, output unread.
func testBurst(t *testing.T, c *client) {
	const size = 8 << 20
	url, out := c.stream(t)
	ctr := c.prepare(t, []string{"sh", "-c", "head -c 8388608 /dev/zero; echo end"})
	ctr.mustCreate(streams{out: url})
	ctr.start("")
	read := make(chan []byte, 1)
	go func() {
		b, _ := io.ReadAll(out)
		read <- b
	}()
	ctr.wait("")
	ctr.delete("")
	if b := <-read; len(b) != size+4 || !bytes.HasSuffix(b, []byte("\x00end\n")) {
		t.Errorf("output = %d bytes; want %d", len(b), size+4)
	}
}

func testExec(t *testing.T, c *client) {
	ctr := c.running(t)
	for _, status := range []uint32{0, 1, 42, 255} {
		out, got := ctr.output("sh", "-c", fmt.Sprintf("echo $PATH; exit %d", status))
		if got != status || out != "/bin\n" {
			t.Errorf("exec = %q, status %d; want %q, status %d", out, got, "/bin\n", status)
		}
	}
	// stdin to an exec, stderr apart.
	inURL, in := c.stream(t)
	outURL, out := c.stream(t)
	errURL, errs := c.stream(t)
	id := ctr.exec(streams{in: inURL, out: outURL, err: errURL}, []string{"sh", "-c", "tr a-z A-Z; echo oops >&2"})
	ctr.start(id)
	io.WriteString(in, "shout")
	in.CloseWrite()
	if b, err := io.ReadAll(out); string(b) != "SHOUT" || err != nil {
		t.Errorf("stdout = %q, %v; want SHOUT", b, err)
	}
	if b, err := io.ReadAll(errs); string(b) != "oops\n" || err != nil {
		t.Errorf("stderr = %q, %v; want oops", b, err)
	}
	if got := ctr.wait(id); got != 0 {
		t.Errorf("status = %d; want 0", got)
	}
	ctr.delete(id)
}

func testParallelExecs(t *testing.T, c *client) {
	const n = 50
	ctr := c.running(t)
	begin := time.Now()
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			want := fmt.Sprintf("%d\n", i)
			if out, status := ctr.output("sh", "-c", fmt.Sprintf("echo %d; exit %d", i, i)); out != want || status != uint32(i) {
				t.Errorf("exec %d = %q, status %d; want %q, status %d", i, out, status, want, i)
			}
		})
	}
	wg.Wait()
	t.Logf("%d execs at once in %v", n, time.Since(begin))
}

// testBackgroundChild checks that an exit is reported at once although a
// child keeps the output open, and that the output goes on.
func testBackgroundChild(t *testing.T, c *client) {
	ctr := c.running(t)
	url, out := c.stream(t)
	id := ctr.exec(streams{out: url}, []string{"sh", "-c", "(read x < /tmp/go; echo late) & echo early"}, func(*specs.Process) {})
	if _, status := ctr.output("mkfifo", "/tmp/go"); status != 0 {
		t.Fatal("mkfifo")
	}
	ctr.start(id)
	if got := ctr.wait(id); got != 0 {
		t.Errorf("status = %d; want 0", got)
	}
	b := make([]byte, 6)
	if _, err := io.ReadFull(out, b); string(b) != "early\n" || err != nil {
		t.Errorf("stdout = %q, %v; want early", b, err)
	}
	if _, status := ctr.output("sh", "-c", "echo > /tmp/go"); status != 0 {
		t.Fatal("release the child")
	}
	if b, err := io.ReadAll(out); string(b) != "late\n" || err != nil {
		t.Errorf("stdout after the exit = %q, %v; want late", b, err)
	}
	ctr.delete(id)
}

// testHostDoesNotRead checks that nobody waits for a host that does not read.
func testHostDoesNotRead(t *testing.T, c *client) {
	ctr := c.running(t)
	url, _ := c.stream(t)
	// What the pipes hold, then the end.
	id := ctr.exec(streams{out: url}, []string{"sh", "-c", "head -c 65536 /dev/zero; exit 4"})
	ctr.start(id)
	if got := ctr.wait(id); got != 4 {
		t.Errorf("status = %d; want 4", got)
	}
	if out, _ := ctr.output("echo", "alive"); out != "alive\n" {
		t.Errorf("another exec = %q; want alive", out)
	}
	ctr.delete(id)
}

func testTerminal(t *testing.T, c *client) {
	ctr := c.running(t)
	inURL, in := c.stream(t)
	outURL, out := c.stream(t)
	id := ctr.exec(streams{in: inURL, out: outURL, terminal: true}, []string{"sh", "-c", "tty; read x; stty size; exit 5"})
	ctr.start(id)
	ctx := testContext(t)
	if _, err := c.task.ResizePty(ctx, &taskapi.ResizePtyRequest{ID: ctr.id, ExecID: id, Width: 132, Height: 43}); err != nil {
		t.Errorf("ResizePty() = %v", err)
	}
	io.WriteString(in, "x\n")
	b, err := io.ReadAll(out)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"/dev/pts/", "43 132"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("terminal's output = %q; want %q in it", b, want)
		}
	}
	if got := ctr.wait(id); got != 5 {
		t.Errorf("status = %d; want 5", got)
	}
	ctr.delete(id)
}

// testTerminalStdin checks that the agent closes stdin of a terminal when the
// process has ended, whatever the host does.
func testTerminalStdin(t *testing.T, c *client) {
	ctr := c.running(t)
	inURL, in := c.stream(t)
	outURL, _ := c.stream(t)
	id := ctr.exec(streams{in: inURL, out: outURL, terminal: true}, []string{"true"})
	ctr.start(id)
	ctr.wait(id)
	ctr.delete(id)
	if _, err := in.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("read from stdin's stream after Delete = %v; want EOF", err)
	}
}

// testStdinBeforeStart sends everything and half-closes before Start.
func testStdinBeforeStart(t *testing.T, c *client) {
	ctr := c.running(t)
	for _, size := range []int{0, 1, 100 << 10} {
		inURL, in := c.stream(t)
		outURL, out := c.stream(t)
		id := ctr.exec(streams{in: inURL, out: outURL}, []string{"wc", "-c"})
		in.Write(noise(size))
		in.CloseWrite()
		ctr.start(id)
		if b, err := io.ReadAll(out); strings.TrimSpace(string(b)) != fmt.Sprint(size) || err != nil {
			t.Errorf("wc -c = %q, %v; want %d", b, err, size)
		}
		ctr.wait(id)
		ctr.delete(id)
	}
}

func testKillAndPids(t *testing.T, c *client) {
	ctr := c.running(t)
	id := ctr.exec(streams{}, []string{"sleep", "1000"})
	ctr.start(id)
	ctx := testContext(t)
	pids, err := c.task.Pids(ctx, &taskapi.PidsRequest{ID: ctr.id})
	if err != nil {
		t.Fatal(err)
	}
	var execs []string
	for _, p := range pids.Processes {
		if p.Info != nil {
			var d options.ProcessDetails
			if err := typeurl.UnmarshalTo(p.Info, &d); err != nil {
				t.Fatal(err)
			}
			execs = append(execs, d.ExecID)
		}
	}
	if len(pids.Processes) != 2 || !cmp.Equal(execs, []string{id}) {
		t.Errorf("Pids() = %v; want two, one of them exec %s", pids.Processes, id)
	}
	if _, err := c.task.Kill(ctx, &taskapi.KillRequest{ID: ctr.id, ExecID: id, Signal: 15}); err != nil {
		t.Errorf("Kill(exec) = %v", err)
	}
	if got := ctr.wait(id); got != 128+15 {
		t.Errorf("status of the exec = %d; want %d", got, 128+15)
	}
	ctr.delete(id)
	if _, err := c.task.Kill(ctx, &taskapi.KillRequest{ID: ctr.id, Signal: 9, All: true}); err != nil {
		t.Errorf("Kill(all) = %v", err)
	}
	if got := ctr.wait(""); got != 128+9 {
		t.Errorf("status = %d; want %d", got, 128+9)
	}
	if _, err := c.task.Kill(ctx, &taskapi.KillRequest{ID: ctr.id, Signal: 9}); !isKind(err, errdefs.IsNotFound) {
		t.Errorf("Kill() of a stopped container = %v; want not found", err)
	}
}

func testPauseResume(t *testing.T, c *client) {
	ctr := c.running(t)
	ctx := testContext(t)
	for _, tt := range []struct {
		name string
		call func() error
		want task.Status
	}{
		{"Pause", func() error { _, err := c.task.Pause(ctx, &taskapi.PauseRequest{ID: ctr.id}); return err }, task.Status_PAUSED},
		{"Resume", func() error { _, err := c.task.Resume(ctx, &taskapi.ResumeRequest{ID: ctr.id}); return err }, task.Status_RUNNING},
	} {
		if err := tt.call(); err != nil {
			t.Fatalf("%s() = %v", tt.name, err)
		}
		if s, err := c.task.State(ctx, &taskapi.StateRequest{ID: ctr.id}); err != nil || s.Status != tt.want {
			t.Errorf("State() after %s = %v, %v; want %v", tt.name, s.GetStatus(), err, tt.want)
		}
	}
}

func testStats(t *testing.T, c *client) {
	if !c.cgroups() {
		t.Skip("no cgroup v2 controllers")
	}
	ctr := c.running(t, func(s *specs.Spec) {
		limit := int64(32 << 20)
		s.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}, Pids: &specs.LinuxPids{Limit: ptr(int64(100))}}
	})
	r, err := c.task.Stats(testContext(t), &taskapi.StatsRequest{ID: ctr.id})
	if err != nil {
		t.Fatal(err)
	}
	if want := "io.containerd.cgroups.v2.Metrics"; r.Stats.TypeUrl != want {
		t.Errorf("Stats() = a %s; want %s", r.Stats.TypeUrl, want)
	}
	checkMetrics(t, r.Stats)
	_, err = c.task.Update(testContext(t), &taskapi.UpdateTaskRequest{ID: ctr.id, Resources: &anypb.Any{
		TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources", Value: []byte(`{"pids":{"limit":50}}`)}})
	if err != nil {
		t.Errorf("Update() = %v", err)
	}
}

func ptr[T any](v T) *T { return &v }
