package conformance

import (
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"

	eventsapi "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
)

func (s *shim) kill(signal syscall.Signal, all bool) {
	s.t.Helper()
	if _, err := s.task.Kill(s.call(), &taskapi.KillRequest{ID: s.id, Signal: uint32(signal), All: all}); err != nil {
		s.t.Fatalf("Kill(%v) = %v; want nil", signal, err)
	}
}

func TestSignals(t *testing.T) {
	s := newShim(t, args("sh", "-c", "trap 'echo term' TERM; trap 'echo usr1' USR1; echo ready; while :; do sleep 0.1; done"))
	st := newStreams(t, false, false)
	s.mustCreate(st, false)
	s.mustStart("")
	st.out.waitFor(t, "ready\n")
	s.kill(syscall.SIGTERM, false)
	st.out.waitFor(t, "term\n")
	s.kill(syscall.SIGUSR1, false)
	st.out.waitFor(t, "usr1\n")
	s.kill(syscall.SIGKILL, true)
	if got := s.wait(""); got != 137 {
		t.Errorf("exit status after SIGKILL = %d; want 137", got)
	}
	if d := s.delete(""); d.ExitStatus != 137 {
		t.Errorf("Delete = status %d; want 137", d.ExitStatus)
	}
}

// A signal that ends the host process which stands for the container reaches
// the container.
func TestHostKill(t *testing.T) {
	s := newShim(t, args("sleep", "1000"))
	pid := s.mustCreate(nil, false)
	s.mustStart("")
	if err := syscall.Kill(int(pid), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if got := s.wait(""); got != 137 {
		t.Errorf("exit status = %d; want 137", got)
	}
}

func TestExitCodes(t *testing.T) {
	s := newShim(t, args("sleep", "1000"))
	s.mustCreate(nil, false)
	s.mustStart("")
	codes := make(chan uint32)
	var wg sync.WaitGroup
	for range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for want := range codes {
				id := fmt.Sprintf("x%d", want)
				if err := s.addExec(id, nil, false, "sh", "-c", fmt.Sprintf("exit %d", want)); err != nil {
					t.Errorf("Exec(%s) = %v; want nil", id, err)
					continue
				}
				if _, err := s.task.Start(s.call(), &taskapi.StartRequest{ID: s.id, ExecID: id}); err != nil {
					t.Errorf("Start(%s) = %v; want nil", id, err)
					continue
				}
				resp, err := s.task.Wait(s.call(), &taskapi.WaitRequest{ID: s.id, ExecID: id})
				if err != nil || resp.ExitStatus != want {
					t.Errorf("Wait(%s) = %v, %v; want status %d", id, resp, err, want)
				}
				if d, err := s.task.Delete(s.call(), &taskapi.DeleteRequest{ID: s.id, ExecID: id}); err != nil || d.ExitStatus != want {
					t.Errorf("Delete(%s) = %v, %v; want status %d", id, d, err, want)
				}
			}
		}()
	}
	for code := range uint32(256) {
		codes <- code
	}
	close(codes)
	wg.Wait()
}

func TestPauseAndMetrics(t *testing.T) {
	s := newShim(t, args("sleep", "1000"))
	s.mustCreate(nil, false)
	s.mustStart("")
	if _, err := s.task.Pause(s.call(), &taskapi.PauseRequest{ID: s.id}); err != nil {
		t.Fatal(err)
	}
	checkState(t, s, task.Status_PAUSED)
	waitFor(t, s.events, func(e *eventsapi.TaskPaused) bool { return e.ContainerID == s.id })
	if _, err := s.task.Resume(s.call(), &taskapi.ResumeRequest{ID: s.id}); err != nil {
		t.Fatal(err)
	}
	checkState(t, s, task.Status_RUNNING)
	waitFor(t, s.events, func(e *eventsapi.TaskResumed) bool { return e.ContainerID == s.id })
	got, err := s.task.Stats(s.call(), &taskapi.StatsRequest{ID: s.id})
	if err != nil || !strings.HasSuffix(got.GetStats().GetTypeUrl(), "io.containerd.cgroups.v2.Metrics") {
		t.Errorf("Stats = %v, %v; want cgroup v2 metrics", got.GetStats().GetTypeUrl(), err)
	}
}

// Each error keeps the container alive, and has the words that clients match.
func TestExecErrors(t *testing.T) {
	s := newShim(t, args("sleep", "1000"))
	s.mustCreate(nil, false)
	s.mustStart("")
	for _, tc := range []struct {
		name, want string
		args       []string
	}{
		{"missing", "executable file not found in $PATH", []string{"no-such-program"}},
		{"missing path", "no such file or directory", []string{"/no/such/program"}},
		{"not executable", "permission denied", []string{"/etc/passwd"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			id := strings.ReplaceAll(tc.name, " ", "-")
			if err := s.addExec(id, nil, false, tc.args...); err != nil {
				t.Fatal(err)
			}
			_, err := s.task.Start(s.call(), &taskapi.StartRequest{ID: s.id, ExecID: id})
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Start = %v; want %q in it", err, tc.want)
			}
			s.delete(id)
		})
	}
	if out, _, _ := s.exec("alive", "echo", "yes"); out != "yes\n" {
		t.Errorf("exec after errors = %q; want yes", out)
	}
}

func TestErrorKinds(t *testing.T) {
	s := newShim(t, args("sleep", "1000"))
	if _, err := s.task.Start(s.call(), &taskapi.StartRequest{ID: s.id}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("Start before Create = %v; want not found", err)
	}
	s.mustCreate(nil, false)
	if _, err := s.create(nil, false); !errdefs.IsAlreadyExists(errgrpc.ToNative(err)) {
		t.Errorf("second Create = %v; want already exists", err)
	}
	s.mustStart("")
	if _, err := s.task.Delete(s.call(), &taskapi.DeleteRequest{ID: s.id}); err == nil {
		t.Error("Delete of a running container = nil; want an error")
	}
	if _, err := s.task.Checkpoint(s.call(), &taskapi.CheckpointTaskRequest{ID: s.id}); !errdefs.IsNotImplemented(errgrpc.ToNative(err)) {
		t.Errorf("Checkpoint = %v; want not implemented", err)
	}
	if _, err := s.task.Kill(s.call(), &taskapi.KillRequest{ID: s.id, ExecID: "none", Signal: 9}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("Kill of an unknown exec = %v; want not found", err)
	}
	s.kill(syscall.SIGKILL, false)
	s.wait("")
	if err := s.addExec("late", nil, false, "true"); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("Exec after exit = %v; want failed precondition", err)
	}
	if _, err := s.task.Kill(s.call(), &taskapi.KillRequest{ID: s.id, Signal: 9}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("Kill after exit = %v; want not found", err)
	}
}
