package state

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// sleeper starts a process and returns it with its command.
func sleeper(t *testing.T) (Process, *exec.Cmd) {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	p, err := Find(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return p, cmd
}

func TestProcess(t *testing.T) {
	p, cmd := sleeper(t)
	if !p.Alive() {
		t.Errorf("%+v.Alive() = false; want true", p)
	}
	recycled := Process{Pid: p.Pid, StartTime: p.StartTime + 1}
	if recycled.Alive() {
		t.Error("Alive() of a recycled pid = true; want false")
	}
	if err := recycled.Kill(); err != nil {
		t.Errorf("Kill() of a recycled pid = %v; want nil", err)
	}
	if err := recycled.Wait(t.Context()); err != nil {
		t.Errorf("Wait() for a recycled pid = %v; want nil", err)
	}
	if !p.Alive() {
		t.Fatal("Kill() of a recycled pid killed its new owner")
	}

	ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Millisecond, errors.New("too long"))
	defer cancel()
	if err := p.Wait(ctx); !errors.Is(err, context.Cause(ctx)) || err == nil {
		t.Errorf("Wait() = %v; want %v", err, context.Cause(ctx))
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(t.Context()); err != nil {
		t.Errorf("Wait() = %v; want nil", err)
	}
	// Not waited for yet: a zombie.
	if p.Alive() {
		t.Error("Alive() of a zombie = true; want false")
	}
	_ = cmd.Wait()
	if err := p.Kill(); err != nil {
		t.Errorf("Kill() of a process that is gone = %v; want nil", err)
	}
	if _, err := Find(p.Pid); !errdefs.IsNotFound(err) {
		t.Errorf("Find() of a process that is gone: error = %v; want not found", err)
	}
}

func TestNoProcess(t *testing.T) {
	for _, p := range []Process{{}, {Pid: -1}, {Pid: 1 << 30}} {
		if p.Alive() || p.Kill() != nil || p.Wait(t.Context()) != nil {
			t.Errorf("%+v: alive, or cannot be killed or waited for", p)
		}
		if _, err := Find(p.Pid); !errdefs.IsNotFound(err) {
			t.Errorf("Find(%d) error = %v; want not found", p.Pid, err)
		}
	}
	if p, err := Find(os.Getpid()); err != nil || !p.Alive() {
		t.Errorf("Find() of this process = %+v, %v; want it alive", p, err)
	}
}

// The number of a process that has ended still names its session while others
// are in it, as QEMU is in a shim's.
func TestProcessOfLivingSession(t *testing.T) {
	cmd := exec.Command("sh", "-c", "sleep 1000 & echo $!; read x")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var child int
	if _, err := fmt.Fscan(out, &child); err != nil {
		t.Fatal(err)
	}
	defer syscall.Kill(child, syscall.SIGKILL)
	p, err := Find(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	in.Close()
	_ = cmd.Wait() // read fails at the end of its input
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := errors.Join(p.Wait(ctx), p.Kill()); err != nil || p.Alive() {
		t.Errorf("Wait and Kill of a process that is gone = %v, alive %t; want nil, false", err, p.Alive())
	}
	if err := syscall.Kill(child, 0); err != nil {
		t.Errorf("the other process of the session: %v; want that it lives", err)
	}
}

func TestParseStat(t *testing.T) {
	const tail = " 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20 21\n"
	for _, tt := range []struct {
		in     string
		start  uint64
		status byte
		ok     bool
	}{
		{"7 (sleep) S" + tail, 4242, 'S', true},
		{"7 (a) Z 1 (b)) R" + tail, 4242, 'R', true},
		{"7 (sleep) S 1 2 3", 0, 0, false},
		{"", 0, 0, false},
		{")", 0, 0, false},
		{"7 (x) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 -1", 0, 0, false},
	} {
		var want status
		if tt.ok {
			want = status{start: tt.start, status: tt.status, flags: 6}
		}
		got, err := parseStat([]byte(tt.in))
		if got != want || (err == nil) != tt.ok {
			t.Errorf("parseStat(%q) = %+v, %v; want %+v, ok %t", tt.in, got, err, want, tt.ok)
		}
	}
}
