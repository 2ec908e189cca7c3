package conformance

import (
	"strings"
	"testing"

	cgroup2stats "github.com/containerd/cgroups/v3/cgroup2/stats"
	eventsapi "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"
)

const mib = 1 << 20

// eat is a command that needs much more memory than it may have. It is
// expected to be killed: the shell adds 128 to the signal.
var eat = []string{"dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1"}

func memoryLimit(bytes int64) func(*specs.Spec) {
	return func(s *specs.Spec) { s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &bytes} }
}

// running adds a container that runs a command until it is killed.
func (s *shim) running(t testing.TB, o options) *shim {
	t.Helper()
	c := s.add(t, o)
	c.mustCreate(nil, false)
	c.mustStart("")
	return c
}

func TestOOM(t *testing.T) {
	s := newShim(t, options{})
	neighbour := s.running(t, options{spec: sleeper})
	oomed := func(c *shim) {
		c.t.Helper()
		waitFor(c.t, c.events, func(e *eventsapi.TaskOOM) bool { return e.ContainerID == c.id })
	}
	t.Run("init", func(t *testing.T) {
		c := s.running(t, options{spec: func(spec *specs.Spec) {
			spec.Process.Args = eat
			memoryLimit(24 * mib)(spec)
		}})
		if got := c.wait(""); got != 137 {
			t.Errorf("exit status = %d; want 137", got)
		}
		oomed(c)
	})
	t.Run("exec", func(t *testing.T) {
		c := s.running(t, options{spec: func(spec *specs.Spec) {
			sleeper(spec)
			memoryLimit(24 * mib)(spec)
		}})
		if err := c.addExec("before", nil, false, "sleep", "1000"); err != nil {
			t.Fatal(err)
		}
		c.mustStart("before")
		if _, _, status := c.exec("eat", eat...); status != 137 {
			t.Errorf("exit status = %d; want 137", status)
		}
		oomed(c)
		// As with runc, the kernel kills one process, and the others go on.
		checkState(t, c, task.Status_RUNNING)
		if st, err := c.task.State(c.call(), &taskapi.StateRequest{ID: c.id, ExecID: "before"}); err != nil || st.Status != task.Status_RUNNING {
			t.Errorf("State of another exec = %v, %v; want running", st, err)
		}
		c.wantShell("after", "echo alive", "alive\n")
	})
	checkState(t, neighbour, task.Status_RUNNING)
	neighbour.in(t).wantShell("after", "echo alive", "alive\n")
	all, _ := s.events.list()
	for _, ev := range all {
		if e, ok := ev.(*eventsapi.TaskOOM); ok && e.ContainerID == neighbour.id {
			t.Error("the neighbour has an OOM event")
		}
	}
}

func (s *shim) metrics() *cgroup2stats.Metrics {
	s.t.Helper()
	resp, err := s.task.Stats(s.call(), &taskapi.StatsRequest{ID: s.id})
	if err != nil {
		s.t.Fatalf("Stats = %v; want nil", err)
	}
	m := &cgroup2stats.Metrics{}
	if err := typeurl.UnmarshalTo(resp.Stats, m); err != nil {
		s.t.Fatal(err)
	}
	return m
}

// Limits that are changed are those of the guest's cgroup, and hold.
func TestUpdate(t *testing.T) {
	s := newShim(t, options{})
	c := s.running(t, options{spec: func(spec *specs.Spec) {
		sleeper(spec)
		memoryLimit(128 * mib)(spec)
		spec.Linux.Resources.Pids = &specs.LinuxPids{Limit: ptr(int64(100))}
		spec.Linux.Resources.CPU = &specs.LinuxCPU{Quota: ptr(int64(50000)), Period: ptr(uint64(100000))}
	}})
	const limits = "cd /sys/fs/cgroup; cat memory.max memory.low pids.max cpu.max cpu.weight"
	c.wantShell("before", limits, lines("134217728", "0", "100", "50000 100000", "100"))

	if err := c.update(&specs.LinuxResources{
		Memory:  &specs.LinuxMemory{Limit: ptr(int64(64 * mib)), Reservation: ptr(int64(16 * mib))},
		Pids:    &specs.LinuxPids{Limit: ptr(int64(20))},
		CPU:     &specs.LinuxCPU{Quota: ptr(int64(10000)), Period: ptr(uint64(25000))},
		Unified: map[string]string{"cpu.weight": "55"},
	}); err != nil {
		t.Fatalf("Update = %v; want nil", err)
	}
	c.wantShell("after", limits, lines("67108864", "16777216", "20", "10000 25000", "55"))
	if m := c.metrics(); m.Memory.UsageLimit != 64*mib || m.Pids.Limit != 20 {
		t.Errorf("Stats = memory limit %d, pids limit %d; want %d, 20", m.Memory.UsageLimit, m.Pids.Limit, 64*mib)
	}

	if _, _, status := c.exec("eat", eat...); status != 137 {
		t.Errorf("exit status beyond the new memory limit = %d; want 137", status)
	}
	c.wantShell("throttled", "i=0; while [ $i -lt 500 ]; do i=$((i+1)); done; awk '/nr_throttled/ {print ($2 > 0)}' /sys/fs/cgroup/cpu.stat", "1\n")
	if err := c.update(&specs.LinuxResources{
		CPU:    &specs.LinuxCPU{Quota: ptr(int64(-1)), Period: ptr(uint64(100000))},
		Memory: &specs.LinuxMemory{Limit: ptr(int64(-1))},
	}); err != nil {
		t.Errorf("Update without limits = %v; want nil", err)
	}
	c.wantShell("unlimited", "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max", lines("max", "max 100000", "20"))
	out, _, _ := c.exec("forks", "sh", "-c", "i=0; while [ $i -lt 40 ]; do sleep 5 & i=$((i+1)); done 2>&1 | grep -o 'Resource temporarily unavailable' | head -1")
	if out != "Resource temporarily unavailable\n" {
		t.Errorf("40 processes under a limit of 20 = %q; want that fork fails", out)
	}
	if err := c.update(&specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(-1))}}); err != nil {
		t.Errorf("Update without limit of pids = %v; want nil", err)
	}
	badUpdates(t, c)
}

// badUpdates wants an error for each of them, and the container unharmed.
func badUpdates(t *testing.T, c *shim) {
	other, err := typeurl.MarshalAnyToProto(&eventsapi.TaskOOM{})
	if err != nil {
		t.Fatal(err)
	}
	valid, err := typeurl.MarshalAnyToProto(&specs.LinuxResources{})
	if err != nil {
		t.Fatal(err)
	}
	encoded := func(r *specs.LinuxResources) *anypb.Any {
		a, err := typeurl.MarshalAnyToProto(r)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	for _, tc := range []struct {
		name      string
		resources *anypb.Any
		invalid   bool // else the guest's kernel says no
	}{
		{"nothing", nil, true},
		{"another type", other, true},
		{"no JSON", &anypb.Any{TypeUrl: valid.TypeUrl, Value: []byte("{")}, true},
		{"wrong JSON", &anypb.Any{TypeUrl: valid.TypeUrl, Value: []byte(`{"memory": 5}`)}, true},
		{"unified path", encoded(&specs.LinuxResources{Unified: map[string]string{"../../memory.max": "1"}}), true},
		{"unified name", encoded(&specs.LinuxResources{Unified: map[string]string{"memory": "1"}}), true},
		{"unified file", encoded(&specs.LinuxResources{Unified: map[string]string{"memory.no-such-file": "1"}}), false},
		{"unified value", encoded(&specs.LinuxResources{Unified: map[string]string{"cpu.weight": "many"}}), false},
		{"quota", encoded(&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: ptr(int64(1))}}), false},
		{"period", encoded(&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: ptr(int64(5000)), Period: ptr(uint64(5))}}), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := c.task.Update(c.call(), &taskapi.UpdateTaskRequest{ID: c.id, Resources: tc.resources})
			if err == nil {
				t.Fatal("Update = nil; want an error")
			}
			if got := errdefs.IsInvalidArgument(errgrpc.ToNative(err)); got != tc.invalid {
				t.Errorf("Update = %v; want invalid argument: %t", err, tc.invalid)
			}
		})
	}
	c.wantShell("alive", "cat /sys/fs/cgroup/memory.max", "max\n")
}

func TestPauseAndStats(t *testing.T) {
	s := newShim(t, args("sh", "-c", "while :; do echo tick; sleep 0.05; done"))
	st := newStreams(t, false, false)
	s.mustCreate(st, false)
	s.mustStart("")
	st.out.waitFor(t, "tick")
	if err := s.pause(); err != nil {
		t.Fatal(err)
	}
	checkState(t, s, task.Status_PAUSED)
	waitFor(t, s.events, func(e *eventsapi.TaskPaused) bool { return e.ContainerID == s.id })
	m := s.metrics()
	if m.Memory.Usage == 0 || m.CPU.UsageUsec == 0 || m.Pids.Current < 1 {
		t.Errorf("Stats while paused = memory %d, cpu %d us, %d pids; want all above 0", m.Memory.Usage, m.CPU.UsageUsec, m.Pids.Current)
	}
	// What runs would use CPU time between two readings; what is frozen cannot.
	first := s.metrics().CPU.UsageUsec
	for range 5 {
		if later := s.metrics().CPU.UsageUsec; later != first {
			t.Errorf("a paused container used CPU time: %d us, then %d", first, later)
		}
	}
	if err := s.resume(); err != nil {
		t.Fatal(err)
	}
	checkState(t, s, task.Status_RUNNING)
	waitFor(t, s.events, func(e *eventsapi.TaskResumed) bool { return e.ContainerID == s.id })
	before := strings.Count(st.out.text(), "tick")
	st.out.waitFor(t, strings.Repeat("tick\n", before+1))

	_, err := s.task.Checkpoint(s.call(), &taskapi.CheckpointTaskRequest{ID: s.id})
	if !errdefs.IsNotImplemented(errgrpc.ToNative(err)) {
		t.Errorf("Checkpoint = %v; want not implemented", err)
	}
}

// The size of an exec's terminal can be set before its start and after.
func TestResizeExec(t *testing.T) {
	s := newShim(t, args("sleep", "1000"))
	s.mustCreate(nil, false)
	s.mustStart("")
	st := newStreams(t, true, true)
	if err := s.addExec("tty", st, true, "sh", "-c", "read x; stty size; trap 'stty size; exit 4' WINCH; echo ready; while :; do sleep 0.1; done"); err != nil {
		t.Fatal(err)
	}
	size := func(width, height uint32) {
		t.Helper()
		_, err := s.task.ResizePty(s.call(), &taskapi.ResizePtyRequest{ID: s.id, ExecID: "tty", Width: width, Height: height})
		if err != nil {
			t.Fatalf("ResizePty = %v; want nil", err)
		}
	}
	size(101, 41)
	s.mustStart("tty")
	st.in.WriteString("go\n")
	st.out.waitFor(t, "41 101")
	st.out.waitFor(t, "ready")
	size(102, 42)
	st.out.waitFor(t, "42 102")
	if got := s.wait("tty"); got != 4 {
		t.Errorf("exit status = %d; want 4", got)
	}
}

// Kill of all ends what has left its session, its parent and its group, too.
func TestKillAll(t *testing.T) {
	s := newShim(t, options{spec: func(spec *specs.Spec) {
		// Without a pid namespace of its own nothing else ends them.
		spec.Linux.Namespaces = without(spec.Linux.Namespaces, specs.PIDNamespace)
		spec.Process.Args = []string{"sh", "-c", "setsid sleep 4321 & setsid sh -c 'sleep 4321 & sleep 4321' & sleep 1000"}
	}})
	observer := s.running(t, options{spec: func(spec *specs.Spec) {
		sleeper(spec)
		privileged(spec)
		spec.Linux.Namespaces = without(spec.Linux.Namespaces, specs.PIDNamespace)
	}})
	s.mustCreate(nil, false)
	s.mustStart("")
	const count = "ps -o args | grep -c '^sleep 4321'"
	observer.wantShell("before", "until [ $("+count+") = 3 ]; do sleep 0.1; done", "")
	s.kill(9, true)
	if got := s.wait(""); got != 137 {
		t.Errorf("exit status = %d; want 137", got)
	}
	defer func() {
		if t.Failed() {
			out, _, _ := observer.exec("dmesg", "dmesg")
			t.Log(out)
		}
	}()
	observer.wantShell("after", "i=0; until [ $("+count+") = 0 ] || [ $i = 50 ]; do sleep 0.1; i=$((i+1)); done; "+count+" || true", "0\n")
}
