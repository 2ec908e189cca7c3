package agent_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/guest"
)

// verbs is what only a real machine can show.
func verbs(t *testing.T, v *virtual) {
	for _, tt := range []struct {
		name string
		run  func(*testing.T, *client)
	}{
		{"Clock", testClock},
		{"Devices", testDevices},
		{"OnlineCPUs", testOnlineCPUs},
		{"System", testSystem},
		{"OutOfMemory", testOutOfMemory},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.run(t, connect(t, v)) })
	}
}

// offset measures how far the guest's clock is ahead, and by how much that
// may be wrong.
func (c *client) offset(t *testing.T, r *api.ClockRequest) (offset, uncertainty time.Duration) {
	t.Helper()
	before := time.Now()
	resp, err := c.agent.Clock(testContext(t), r)
	after := time.Now()
	if err != nil {
		t.Fatalf("Clock(%v) = %v", r, err)
	}
	rtt := after.Sub(before)
	return resp.Time.AsTime().Sub(before.Add(rtt / 2)), rtt/2 + time.Millisecond
}

// best returns the most certain of some measurements.
func (c *client) best(t *testing.T) (offset, uncertainty time.Duration) {
	t.Helper()
	uncertainty = time.Hour
	for range 10 {
		if o, u := c.offset(t, &api.ClockRequest{}); u < uncertainty {
			offset, uncertainty = o, u
		}
	}
	return offset, uncertainty
}

func testClock(t *testing.T, c *client) {
	// The handshake has set it; its own delay is left.
	first, u1 := c.best(t)
	if first.Abs() > time.Minute {
		t.Errorf("clock after the handshake is off by %v", first)
	}
	if _, err := c.agent.Clock(testContext(t), &api.ClockRequest{StepNs: -int64(first)}); err != nil {
		t.Fatalf("Clock(step %v) = %v", -first, err)
	}
	left, u2 := c.best(t)
	if limit := u1 + u2 + time.Millisecond; left.Abs() > limit {
		t.Errorf("clock after the handshake, corrected, is off by %v; want within %v", left, limit)
	}
	t.Logf("clock off by %v after the handshake, by %v corrected, ±%v", first, left, u2)
	for _, step := range []time.Duration{time.Hour, -time.Hour, 1500 * time.Millisecond, -1500 * time.Millisecond} {
		before, u1 := c.best(t)
		if _, err := c.agent.Clock(testContext(t), &api.ClockRequest{StepNs: int64(step)}); err != nil {
			t.Fatalf("Clock(step %v) = %v", step, err)
		}
		after, u2 := c.best(t)
		if diff := after - before - step; diff.Abs() > u1+u2 {
			t.Errorf("Clock(step %v) moved the clock by %v; want within %v", step, after-before, u1+u2)
		}
	}
	if _, err := c.agent.Clock(testContext(t), &api.ClockRequest{SlewNs: int64(time.Millisecond)}); err != nil {
		t.Errorf("Clock(slew 1ms) = %v", err)
	}
	if _, err := c.agent.Clock(testContext(t), &api.ClockRequest{SlewNs: int64(time.Hour)}); !isKind(err, errdefs.IsInvalidArgument) {
		t.Errorf("Clock(slew 1h) = %v; want an invalid argument", err)
	}
}

func testDevices(t *testing.T, c *client) {
	r, err := c.agent.Devices(testContext(t), &api.Empty{})
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(r.Devices, func(d *api.Device) bool { return d.Path == "/dev/null" })
	if i < 0 {
		t.Fatalf("Devices() = %v; want /dev/null in it", r.Devices)
	}
	if d := r.Devices[i]; d.Type != "c" || d.Major != 1 || d.Minor != 3 || d.Mode != 0o666 {
		t.Errorf("/dev/null = %v; want c 1 3, mode 666", d)
	}
}

func testOnlineCPUs(t *testing.T, c *client) {
	ctr := c.running(t)
	for _, n := range []uint32{2, 1, 2} {
		if _, err := c.agent.OnlineCPUs(testContext(t), &api.OnlineCPUsRequest{Count: n}); err != nil {
			t.Fatalf("OnlineCPUs(%d) = %v", n, err)
		}
		if out, _ := ctr.output("nproc"); strings.TrimSpace(out) != fmt.Sprint(n) {
			t.Errorf("nproc after OnlineCPUs(%d) = %q", n, out)
		}
	}
	if _, err := c.agent.OnlineCPUs(testContext(t), &api.OnlineCPUsRequest{Count: 3}); !isKind(err, errdefs.IsOutOfRange) {
		t.Errorf("OnlineCPUs(3) of 2 = %v; want out of range", err)
	}
}

// testSystem looks at what containers inherit from the agent's boot.
func testSystem(t *testing.T, c *client) {
	ctr := c.running(t, func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/sys", Type: "bind", Source: "/sys", Options: []string{"rbind", "ro"}})
	})
	for _, tt := range []struct{ script, want string }{
		{"ulimit -n", "1048576"},
		{"ulimit -u", "unlimited"},
		{"cat /proc/sys/net/ipv4/ping_group_range", "0\t2147483647"},
		{"cat /proc/sys/vm/overcommit_memory", "1"},
		{"cat /proc/sys/kernel/pid_max", "4194304"},
		{"cat /sys/class/net/lo/flags", "0x9"},
		{"ls -l /proc/self/fd/1 | grep -c pipe", "1"},
		// Blocking, as every program expects: no O_NONBLOCK (04000).
		{"grep flags /proc/self/fdinfo/1", "flags:\t01"},
	} {
		out, status := ctr.output("sh", "-c", tt.script)
		if strings.TrimSpace(out) != tt.want || status != 0 {
			t.Errorf("%s = %q, status %d; want %q", tt.script, out, status, tt.want)
		}
	}
	controllers, _ := ctr.output("cat", "/sys/fs/cgroup/cgroup.subtree_control")
	for _, want := range []string{"cpu", "cpuset", "io", "memory", "pids"} {
		if !slices.Contains(strings.Fields(controllers), want) {
			t.Errorf("controllers of child groups = %q; want %s among them", controllers, want)
		}
	}
}

func testOutOfMemory(t *testing.T, c *client) {
	events := c.events(t)
	ctr := c.prepare(t, []string{"dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"}, func(s *specs.Spec) {
		s.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(16 << 20)), Swap: ptr(int64(16 << 20))}}
	})
	ctr.mustCreate(streams{})
	ctr.start("")
	if got := ctr.wait(""); got != 128+9 {
		t.Errorf("status = %d; want %d", got, 128+9)
	}
	for {
		e, ok := <-events
		if !ok {
			t.Fatal("no out-of-memory event")
		}
		var oom eventstypes.TaskOOM
		if typeurl.Is(e.Event, &oom) && typeurl.UnmarshalTo(e.Event, &oom) == nil && oom.ContainerID == ctr.id {
			return
		}
	}
}

// ends waits for the end of the machine.
func (v *virtual) ends(t *testing.T, why string) {
	t.Helper()
	select {
	case <-v.vm.Done():
	case <-time.After(patience):
		t.Fatalf("%s: the machine does not end", why)
	}
}

// says checks that the console said something.
func (v *virtual) says(t *testing.T, want string) {
	t.Helper()
	if got := v.console.text(); !strings.Contains(got, want) {
		t.Errorf("console = %q; want %q in it", got, want)
	}
}

func TestVMShutdown(t *testing.T) {
	v := bootVM(t, vmSpec{kind: guest.Tuned})
	c := connect(t, v)
	ctr := c.prepare(t, []string{"sh", "-c", "trap '' TERM; sleep 1000"})
	ctr.forget()
	if _, err := c.task.Create(testContext(t), &taskapi.CreateTaskRequest{ID: ctr.id, Bundle: api.BundlePath(ctr.id), Options: runcOptions()}); err != nil {
		t.Fatal(err)
	}
	ctr.start("")
	begin := time.Now()
	if _, err := c.agent.Shutdown(testContext(t), &api.Empty{}); err != nil {
		t.Logf("Shutdown() = %v", err) // the answer may be lost
	}
	v.ends(t, "Shutdown")
	t.Logf("the machine with a container that ignores SIGTERM ended after %v", time.Since(begin))
}

func TestVMHostGone(t *testing.T) {
	v := bootVM(t, vmSpec{kind: guest.Tuned})
	connect(t, v)
	v.host.Close()
	v.ends(t, "the host's connection has ended")
	v.says(t, "the host is gone")
}

func TestVMRefused(t *testing.T) {
	v := bootVM(t, vmSpec{kind: guest.Tuned, welcome: &api.Welcome{Refused: "protocol 7 is not 8"}})
	v.ends(t, "refused")
	v.says(t, "the host refuses this guest: protocol 7 is not 8")
}

// TestVMCrash checks that the end of the agent is the end of the machine, with
// the reason on the console.
func TestVMCrash(t *testing.T) {
	v := bootVM(t, vmSpec{kind: guest.Tuned})
	c := connect(t, v)
	ctr := c.prepare(t, []string{"kill", "-QUIT", "1"}, func(s *specs.Spec) { s.Linux.Namespaces = s.Linux.Namespaces[1:] })
	ctr.forget()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := c.task.Create(ctx, &taskapi.CreateTaskRequest{ID: ctr.id, Bundle: api.BundlePath(ctr.id), Options: runcOptions()}); err != nil {
		t.Fatal(err)
	}
	c.task.Start(ctx, &taskapi.StartRequest{ID: ctr.id})
	v.ends(t, "the agent has crashed")
	v.says(t, "SIGQUIT")
	v.says(t, "goroutine")
}

// TestVMHello checks what the handshake says.
func TestVMHello(t *testing.T) {
	v := bootVM(t, vmSpec{kind: guest.Tuned, cmdline: []string{"vmrt.debug"}, welcome: &api.Welcome{Time: timestamppb.Now(), Hostname: "other"}})
	if v.hello.Protocol != api.ProtocolVersion || v.hello.Version == "" || !strings.HasPrefix(v.hello.Kernel, "6.") || !v.hello.Time.IsValid() {
		t.Errorf("Hello = %v; want protocol %d, a version, a kernel and a time", &v.hello, api.ProtocolVersion)
	}
	phases := awaitPhases(t, v)
	for _, want := range []string{"start=", "hello=", "serving=", "sysctls="} {
		if !strings.Contains(phases, want) {
			t.Errorf("boot phases = %q; want %q in it", phases, want)
		}
	}
	ctr := connect(t, v).running(t, func(s *specs.Spec) {
		s.Hostname = ""
		s.Linux.Namespaces = s.Linux.Namespaces[:2] // not UTS
	})
	if out, _ := ctr.output("hostname"); out != "other\n" {
		t.Errorf("hostname = %q; want other", out)
	}
}
