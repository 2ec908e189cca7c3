package conformance

import (
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
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
		{"folder", `exec: "/etc": is a directory`, []string{"/etc"}},
		{"empty", `exec: "": executable file not found in $PATH`, []string{""}},
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
