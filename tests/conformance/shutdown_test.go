package conformance

import (
	"errors"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
)

// A client that gives up while its container is being created leaves the rest to
// containerd, which shuts the shim down: nobody else ever comes for what is
// being made.
func TestShutdownDuringCreate(t *testing.T) {
	for _, tc := range []struct {
		name string
		wait func(*shim)
		// deaf: nobody reads the container's output.
		deaf bool
	}{
		{"first folder", func(s *shim) {
			for !exists(filepath.Join(s.dir, "state", namespace, s.id)) {
				time.Sleep(time.Millisecond)
			}
		}, false},
		{"machine starts", func(s *shim) { s.child("qemu-system") }, false},
		{"output without a reader", func(s *shim) { s.child("qemu-system") }, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newShim(t, args("sleep", "1000"))
			pid := s.pid()
			var st *streams
			if tc.deaf {
				st = &streams{stdout: filepath.Join(t.TempDir(), "stdout")}
				if err := syscall.Mkfifo(st.stdout, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			failed := make(chan error, 1)
			go func() {
				_, err := s.create(st, false)
				failed <- err
			}()
			tc.wait(s)
			begin := time.Now()
			// As with runc's shim, its end may come before the answer.
			if _, err := s.task.Shutdown(s.call(), &taskapi.ShutdownRequest{ID: s.id}); err != nil && !errors.Is(err, ttrpc.ErrClosed) {
				t.Errorf("Shutdown = %v; want nil", err)
			}
			if took := time.Since(begin); took > 15*time.Second {
				t.Errorf("Shutdown took %v; want at most 15s", took)
			}
			if err := <-failed; err == nil {
				t.Error("Create = nil; want an error")
			}
			s.waitGone(pid)
		})
	}
}
