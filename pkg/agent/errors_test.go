package agent_test

import (
	"io"
	"regexp"
	"strings"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func testExecErrors(t *testing.T, c *client) {
	ctr := c.running(t)
	folder := `exec: "/etc": is a directory`
	if !c.ownRuntime() {
		folder += "|exec: permission denied" // as Debian 12's says of one
	}
	for _, tt := range []struct {
		name string
		args []string
		edit func(*specs.Process)
		want string // a regular expression
	}{
		{"missing program", []string{"no-such-program"}, nil, `executable file not found in \$PATH`},
		{"missing path", []string{"/no/such/program"}, nil, `exec: "/no/such/program": stat /no/such/program: no such file or directory`},
		{"not executable", []string{"/etc/passwd"}, nil, "permission denied"},
		{"folder", []string{"/etc"}, nil, folder},
		{"bad cwd", []string{"true"}, func(p *specs.Process) { p.Cwd = "/no/such/cwd" }, "no such file or directory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			url, out := c.stream(t)
			edit := tt.edit
			if edit == nil {
				edit = func(*specs.Process) {}
			}
			id := ctr.exec(streams{out: url}, tt.args, edit)
			ctx := testContext(t)
			_, err := c.task.Start(ctx, &taskapi.StartRequest{ID: ctr.id, ExecID: id})
			if err == nil || !regexp.MustCompile(tt.want).MatchString(err.Error()) {
				t.Errorf("Start(%v) = %v; want %q", tt.args, err, tt.want)
			}
			if b, err := io.ReadAll(out); len(b) > 0 || err != nil {
				t.Errorf("stdout = %q, %v; want its end", b, err)
			}
			if _, err := c.task.Start(ctx, &taskapi.StartRequest{ID: ctr.id, ExecID: id}); !isKind(err, errdefs.IsFailedPrecondition) {
				t.Errorf("second Start = %v; want a failed precondition", err)
			}
			if _, err := c.task.Delete(ctx, &taskapi.DeleteRequest{ID: ctr.id, ExecID: id}); err != nil {
				t.Errorf("Delete = %v", err)
			}
		})
	}
	if out, status := ctr.output("echo", "alive"); out != "alive\n" || status != 0 {
		t.Errorf("exec after errors = %q, status %d; want a live container", out, status)
	}
}

func testCreateErrors(t *testing.T, c *client) {
	for _, tt := range []struct {
		name string
		edit func(*specs.Spec)
		want string
	}{
		{"missing program", func(s *specs.Spec) { s.Process.Args = []string{"no-such-program"} }, "executable file not found in $PATH"},
		{"not executable", func(s *specs.Spec) { s.Process.Args = []string{"/etc/passwd"} }, "permission denied"},
		{"bad mount", func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/x", Type: "bind", Source: "/no/such/source", Options: []string{"bind"}})
		}, "no such file or directory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			url, out := c.stream(t)
			ctr := c.prepare(t, []string{"true"}, tt.edit)
			err := ctr.create(streams{out: url})
			if err == nil { // some runtimes find out at start only
				_, err = c.task.Start(testContext(t), &taskapi.StartRequest{ID: ctr.id})
			} else if b, err := io.ReadAll(out); len(b) > 0 || err != nil {
				t.Errorf("stdout = %q, %v; want its end", b, err)
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Create() and Start() = %v; want %q", err, tt.want)
			}
		})
	}
}
