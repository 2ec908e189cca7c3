package conformance

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/guest/initramfs"
	"github.com/vmrt/vmrt/tests/platform"
)

// liar is a shim whose virtual machine runs an agent that was taken over.
func liar(t *testing.T, mode string) *shim {
	t.Helper()
	dir, kind := guestFiles(t, guest.InitramfsFile)
	if kind != guest.Tuned {
		t.Skip("needs the tuned kernel, whose drivers are no modules")
	}
	program, err := platform.Build("tests/conformance/internal/liar", t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	var a initramfs.Archive
	for _, err := range []error{a.File("init", 0o755, b), a.File("mode", 0o644, []byte(mode))} {
		if err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Create(filepath.Join(dir, kind, guest.InitramfsFile))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := a.WriteTo(f); err != nil {
		t.Fatal(err)
	}
	return newShim(t, options{spec: sleeper, config: guestConfig(dir, kind)})
}

// killedWithin wants SIGKILL to end the container, and the shim to have stayed
// small.
func (s *shim) killedWithin(limit time.Duration) {
	s.t.Helper()
	if private := privateKiB(s.t, s.pid()); private > 128<<10 {
		s.t.Errorf("the shim has %d KiB of private memory", private)
	}
	if n := len(s.log.String()); n > 2<<20 {
		s.t.Errorf("the shim has logged %d bytes", n)
	}
	begin := time.Now()
	s.kill(syscall.SIGKILL, true)
	if got := s.wait(""); got != 137 {
		s.t.Errorf("exit status = %d; want 137", got)
	}
	if took := time.Since(begin); took > limit {
		s.t.Errorf("SIGKILL took %v; want at most %v", took, limit)
	}
	s.delete("")
}

// Whatever an agent does that was taken over, the host stays as it is, and the
// pod can be ended.
func TestLyingAgent(t *testing.T) {
	// Tells nobody that its container has ended: the others have their turn
	// while the host waits.
	silent := liar(t, "silent")
	silent.mustCreate(nil, false)
	silent.mustStart("")
	silent.kill(syscall.SIGKILL, false)
	t.Run("events", func(t *testing.T) {
		s := liar(t, "events")
		s.mustCreate(nil, false)
		s.mustStart("")
		const flood = 5 * time.Second
		time.Sleep(flood)
		s.killedWithin(30 * time.Second)
		waitFor(t, s.events, func(e *eventsapi.TaskDelete) bool { return e.ContainerID == s.id })
		counts := map[string]int{}
		all, _ := s.events.list()
		for _, ev := range all {
			switch e := ev.(type) {
			case *eventsapi.TaskOOM:
				counts["oom"]++
			case *eventsapi.TaskStart:
				counts["start"]++
			case *eventsapi.TaskExit:
				counts["exit"]++
				if e.ExitStatus != 137 {
					t.Errorf("exit event with status %d; want 137", e.ExitStatus)
				}
			case *eventsapi.TaskDelete:
				counts["delete"]++
			case *eventsapi.TaskCreate:
			default:
				t.Errorf("event %T reached containerd", ev)
			}
		}
		// One a second, for as long as all of it took.
		if counts["oom"] < 1 || counts["oom"] > 60 || counts["start"] != 1 || counts["exit"] != 1 || counts["delete"] != 1 {
			t.Errorf("containerd got %v; want one of each, and a few of oom", counts)
		}
	})
	t.Run("deaf", func(t *testing.T) {
		s := liar(t, "deaf")
		s.mustCreate(nil, false)
		s.mustStart("")
		// More than fits between host and guest.
		answers := make(chan error)
		for range 2 {
			go func() {
				answers <- s.update(&specs.LinuxResources{Unified: map[string]string{"memory.max": strings.Repeat("1", 2<<20)}})
			}()
		}
		time.Sleep(time.Second) // they are under way, and get no further
		s.killedWithin(60 * time.Second)
		for range 2 {
			if err := <-answers; err == nil {
				t.Error("Update = nil; want an error")
			}
		}
	})
	t.Run("flood", func(t *testing.T) {
		s := liar(t, "flood")
		s.mustCreate(nil, false)
		s.mustStart("")
		const flood = 5 * time.Second
		time.Sleep(flood)
		// What connections can hold, and the shim itself.
		if private := privateKiB(t, s.pid()); private > 64<<10 {
			t.Errorf("the shim has %d KiB of private memory", private)
		} else {
			t.Logf("the shim has %d KiB of private memory", private)
		}
		// The host still reaches the guest.
		if err := stats.call(s); err != nil {
			t.Errorf("Stats = %v; want an answer", err)
		}
		s.killedWithin(30 * time.Second)
	})
	t.Run("giant", func(t *testing.T) {
		s := liar(t, "giant")
		s.mustCreate(nil, false)
		s.mustStart("")
		if err := stats.call(s); err == nil {
			t.Error("Stats = nil; want an error")
		}
		if got := s.wait(""); got != 137 {
			t.Errorf("exit status = %d; want 137", got)
		}
		for deadline := time.Now().Add(callTimeout); !strings.Contains(s.log.String(), "agent sent a message of"); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the log does not say what the agent did")
			}
		}
	})
	t.Run("errors", func(t *testing.T) {
		s := liar(t, "errors")
		s.mustCreate(nil, false)
		s.mustStart("")
		err := s.pause()
		if err == nil || len(err.Error()) > 8<<10 || strings.ContainsAny(err.Error(), "\x1b\x07") || !strings.Contains(err.Error(), "freeze: ?]0;owned?") {
			t.Errorf("Pause = %.100q; want an error that can be shown", err)
		}
		s.killedWithin(30 * time.Second)
	})
	if got := silent.wait(""); got != 137 {
		t.Errorf("exit status of a container whose end the guest keeps silent = %d; want 137", got)
	}
	if want := "did not end within"; !strings.Contains(silent.log.String(), want) {
		t.Errorf("the log lacks %q", want)
	}
	silent.delete("")
}
