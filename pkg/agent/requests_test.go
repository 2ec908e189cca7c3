package agent_test

import (
	"io"
	"testing"
	"time"

	cgroups "github.com/containerd/cgroups/v3/cgroup2/stats"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmrt/vmrt/api"
)

func checkMetrics(t *testing.T, stats *anypb.Any) {
	t.Helper()
	var m cgroups.Metrics
	if err := typeurl.UnmarshalTo(stats, &m); err != nil {
		t.Fatal(err)
	}
	if m.GetPids().GetCurrent() != 1 || m.GetPids().GetLimit() != 100 {
		t.Errorf("pids = %v; want 1 of 100", m.GetPids())
	}
	if m.GetMemory().GetUsage() == 0 || m.GetMemory().GetUsageLimit() != 32<<20 {
		t.Errorf("memory = %v; want some of 32 MiB", m.GetMemory())
	}
}

// testRequests sends what the task service would panic on, and more.
func testRequests(t *testing.T, c *client) {
	ctr := c.running(t)
	ctx := testContext(t)
	wrongOptions, err := typeurl.MarshalAnyToProto(&options.CheckpointOptions{Exit: true})
	if err != nil {
		t.Fatal(err)
	}
	otherRuntime, err := typeurl.MarshalAnyToProto(&options.Options{BinaryName: "/bin/sh"})
	if err != nil {
		t.Fatal(err)
	}
	create := func(edit func(*taskapi.CreateTaskRequest)) func() error {
		return func() error {
			r := &taskapi.CreateTaskRequest{ID: "x1", Bundle: api.BundlePath("x1"), Options: runcOptions()}
			edit(r)
			_, err := c.task.Create(ctx, r)
			return err
		}
	}
	exec := func(edit func(*taskapi.ExecProcessRequest)) func() error {
		return func() error {
			r := &taskapi.ExecProcessRequest{ID: ctr.id, ExecID: "x1", Spec: &anypb.Any{TypeUrl: "x", Value: []byte("{}")}}
			edit(r)
			_, err := c.task.Exec(ctx, r)
			return err
		}
	}
	for _, tt := range []struct {
		name string
		call func() error
		want func(error) bool
	}{
		{"create without id", create(func(r *taskapi.CreateTaskRequest) { r.ID = "" }), errdefs.IsInvalidArgument},
		{"create with a path as id", create(func(r *taskapi.CreateTaskRequest) { r.ID, r.Bundle = "../x", "/run/vmrt/x" }), errdefs.IsInvalidArgument},
		{"create in another bundle", create(func(r *taskapi.CreateTaskRequest) { r.Bundle = "/tmp" }), errdefs.IsInvalidArgument},
		{"create without options", create(func(r *taskapi.CreateTaskRequest) { r.Options = nil }), errdefs.IsInvalidArgument},
		{"create with other options", create(func(r *taskapi.CreateTaskRequest) { r.Options = wrongOptions }), errdefs.IsInvalidArgument},
		{"create with unknown options", create(func(r *taskapi.CreateTaskRequest) { r.Options = &anypb.Any{TypeUrl: "no.such.Type", Value: []byte{1}} }), errdefs.IsInvalidArgument},
		{"create with another runtime", create(func(r *taskapi.CreateTaskRequest) { r.Options = otherRuntime }), errdefs.IsInvalidArgument},
		{"create from a checkpoint", create(func(r *taskapi.CreateTaskRequest) { r.Checkpoint = "/x" }), errdefs.IsNotImplemented},
		{"create with a path as stdout", create(func(r *taskapi.CreateTaskRequest) { r.Stdout = "/dev/console" }), errdefs.IsInvalidArgument},
		{"create with an unknown stream", create(func(r *taskapi.CreateTaskRequest) { r.Stdout = api.StreamURL("no") }), errdefs.IsNotFound},
		{"create twice", create(func(r *taskapi.CreateTaskRequest) { r.ID, r.Bundle = ctr.id, api.BundlePath(ctr.id) }), errdefs.IsAlreadyExists},
		{"exec without spec", exec(func(r *taskapi.ExecProcessRequest) { r.Spec = nil }), errdefs.IsInvalidArgument},
		{"exec with a broken spec", exec(func(r *taskapi.ExecProcessRequest) { r.Spec.Value = []byte("{") }), errdefs.IsInvalidArgument},
		{"exec without id", exec(func(r *taskapi.ExecProcessRequest) { r.ExecID = "" }), errdefs.IsInvalidArgument},
		{"exec with the container's id", exec(func(r *taskapi.ExecProcessRequest) { r.ExecID = ctr.id }), errdefs.IsInvalidArgument},
		{"exec in no container", exec(func(r *taskapi.ExecProcessRequest) { r.ID = "no" }), errdefs.IsNotFound},
		{"start of an unknown exec", func() error {
			_, err := c.task.Start(ctx, &taskapi.StartRequest{ID: ctr.id, ExecID: "no"})
			return err
		}, errdefs.IsNotFound},
		{"update with nothing", func() error {
			_, err := c.task.Update(ctx, &taskapi.UpdateTaskRequest{ID: ctr.id})
			return err
		}, errdefs.IsInvalidArgument},
		{"checkpoint", func() error {
			_, err := c.task.Checkpoint(ctx, &taskapi.CheckpointTaskRequest{ID: ctr.id})
			return err
		}, errdefs.IsNotImplemented},
		{"delete while running", func() error {
			_, err := c.task.Delete(ctx, &taskapi.DeleteRequest{ID: ctr.id})
			return err
		}, func(err error) bool { return err != nil }},
		{"bundle with a path as id", func() error {
			_, err := c.agent.WriteBundle(ctx, &api.WriteBundleRequest{Id: "../x", Config: []byte("{}")})
			return err
		}, errdefs.IsInvalidArgument},
		{"removing a bundle with a path as id", func() error {
			_, err := c.agent.RemoveBundle(ctx, &api.RemoveBundleRequest{Id: ".."})
			return err
		}, errdefs.IsInvalidArgument},
		{"mount outside", func() error {
			_, err := c.agent.Mount(ctx, &api.MountRequest{Mounts: []*api.MountSpec{{Type: "tmpfs", Source: "x", Target: "/tmp/x"}}})
			return err
		}, errdefs.IsInvalidArgument},
		{"no CPUs", func() error {
			_, err := c.agent.OnlineCPUs(ctx, &api.OnlineCPUsRequest{})
			return err
		}, errdefs.IsOutOfRange},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.call(); !isKind(err, tt.want) {
				t.Errorf("got %v; want another error", err)
			}
		})
	}
	if out, status := ctr.output("echo", "alive"); out != "alive\n" || status != 0 {
		t.Errorf("exec after bad requests = %q, status %d; want a live agent", out, status)
	}
}

// testTaskShutdown checks that the task service goes on after Shutdown.
func testTaskShutdown(t *testing.T, c *client) {
	if _, err := c.task.Shutdown(testContext(t), &taskapi.ShutdownRequest{}); err != nil {
		t.Errorf("Shutdown() = %v; want nil", err)
	}
	testEvents(t, c)
}

// testRemoveBundle leaves mounts behind and removes the bundle.
func testRemoveBundle(t *testing.T, c *client) {
	ctr := c.running(t, func(s *specs.Spec) { s.Mounts = s.Mounts[:1] })
	ctx := testContext(t)
	_, err := c.agent.Mount(ctx, &api.MountRequest{Mounts: []*api.MountSpec{
		{Type: "tmpfs", Source: "tmpfs", Target: ctr.rootfs() + "/a"},
		{Type: "tmpfs", Source: "tmpfs", Target: ctr.rootfs() + "/a/b/c"},
		{Source: "/rootfs/etc/passwd", Target: ctr.rootfs() + "/a/file", Options: []string{"bind", "ro"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	ctr.destroy()
	for range 2 {
		if _, err := c.agent.RemoveBundle(ctx, &api.RemoveBundleRequest{Id: ctr.id}); err != nil {
			t.Errorf("RemoveBundle() = %v", err)
		}
	}
	_, err = c.agent.Mount(ctx, &api.MountRequest{Mounts: []*api.MountSpec{
		{Source: api.BundlePath(ctr.id), Target: api.GuestRun + "/x", Options: []string{"bind"}},
	}})
	if err == nil {
		t.Errorf("the bundle is still there after RemoveBundle")
	}
}

// testNothingIsLeft looks, from a container without a pid namespace of its
// own, at what the agent still has open after everything else ran.
func testNothingIsLeft(t *testing.T, c *client) {
	ctr := c.running(t, func(s *specs.Spec) { s.Linux.Namespaces = s.Linux.Namespaces[1:] })
	count := func() string {
		// It waits for input, so that all of its own start is over. pidfds
		// are Go's, of processes that another part has reaped, and last until
		// the collector has run.
		inURL, in := c.stream(t)
		outURL, out := c.stream(t)
		id := ctr.exec(streams{in: inURL, out: outURL}, []string{"sh", "-c",
			"read x; ls -l /proc/1/fd | grep -v pidfd | wc -l; ls /proc/1/root/run/vmrt/io /proc/1/root/run/vmrt/bundles | wc -l"})
		ctr.start(id)
		io.WriteString(in, "go\n")
		b, err := io.ReadAll(out)
		if err != nil {
			t.Fatal(err)
		}
		if status := ctr.wait(id); status != 0 {
			t.Fatalf("look at the agent = %q, status %d", b, status)
		}
		ctr.delete(id)
		in.Close()
		out.Close()
		return string(b)
	}
	before := count()
	for range 2 { // as tests of their own, so that they clean up
		t.Run("StdinBeforeStart", func(t *testing.T) { testStdinBeforeStart(t, c) })
		t.Run("Terminal", func(t *testing.T) { testTerminal(t, c) })
		t.Run("Lifecycle", func(t *testing.T) { testLifecycle(t, c) })
		t.Run("CreateErrors", func(t *testing.T) { testCreateErrors(t, c) })
	}
	t.Logf("descriptors and files of the agent: %q", before)
	after := count()
	for deadline := time.Now().Add(patience); after != before && time.Now().Before(deadline); {
		after = count() // connections take a moment to end
	}
	if after != before {
		t.Errorf("descriptors and files of the agent = %q; want %q", after, before)
	}
}
