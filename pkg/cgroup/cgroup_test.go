package cgroup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// kinds are the machines that the tests stand for: this one's hierarchies all
// together, and each version alone.
func kinds(t *testing.T) map[string][]hierarchy {
	t.Helper()
	all, err := hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]hierarchy{}
	for _, h := range all {
		probe := filepath.Join(h.root, fmt.Sprintf("vmrt-probe-%d", os.Getpid()))
		if err := os.Mkdir(probe, 0o755); err != nil {
			t.Logf("%s is left out: %v", h, err)
			continue
		}
		_ = os.Remove(probe)
		kind := "v1"
		if h.v2 {
			kind = "v2"
		}
		out[kind] = append(out[kind], h)
	}
	switch {
	case len(out) == 0:
		t.Skip("no cgroup can be made: not root, or /sys/fs/cgroup is read-only")
	case len(out) == 2:
		out["hybrid"] = slices.Concat(out["v2"], out["v1"])
	}
	return out
}

// each runs a test on each kind with a cgroup of its own.
func each(t *testing.T, test func(t *testing.T, hs []hierarchy, c *Cgroup)) {
	for kind, hs := range kinds(t) {
		t.Run(kind, func(t *testing.T) {
			p := fmt.Sprintf("/vmrt-test-%d/%s", os.Getpid(), strings.ReplaceAll(t.Name(), "/", "-"))
			c, err := create(hs, p, "")
			if err != nil {
				t.Fatal(err)
			}
			if w := c.Warnings(); len(w) > 0 {
				t.Logf("warnings: %q", w)
			}
			t.Cleanup(func() {
				ctx := context.Background()
				if err := errors.Join(c.Kill(ctx), c.Remove(ctx)); err != nil {
					t.Error(err)
				}
				for _, pl := range c.places {
					if pl.exists() {
						t.Errorf("%s is left", pl.dir)
					}
					_ = os.Remove(filepath.Dir(pl.dir))
				}
			})
			test(t, hs, c)
		})
	}
}

// start starts a shell script in the cgroup.
func start(t *testing.T, c *Cgroup, script string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sh", "-c", script)
	if err := c.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Kill(context.Background()); err != nil {
			t.Error(err)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd
}

func TestStartAndKill(t *testing.T) {
	each(t, func(t *testing.T, hs []hierarchy, c *Cgroup) {
		cmd := exec.Command("sh", "-c", "sleep 1000 & setsid sleep 1000 & echo started; wait")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(cmd); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 8)); err != nil {
			t.Fatal(err)
		}
		pids, err := c.Pids()
		if err != nil || len(pids) != 3 || !slices.Contains(pids, cmd.Process.Pid) {
			t.Errorf("Pids() = %v, %v; want 3 with %d", pids, err, cmd.Process.Pid)
		}
		for _, p := range c.places {
			if got, err := p.pids(); err != nil || len(got) != 3 {
				t.Errorf("%s has processes %v, error %v; want 3", p.hierarchy, got, err)
			}
		}
		// Somebody else finds and kills them.
		other, err := load(hs, c.Path())
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := other.Kill(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if err := cmd.Wait(); err == nil || err.Error() != "signal: killed" {
			t.Errorf("Wait() = %v; want killed", err)
		}
		for _, pid := range pids {
			if err := unix.Kill(pid, 0); err == nil && !zombie(pid) {
				t.Errorf("process %d is alive", pid)
			}
		}
		for range 2 {
			if err := other.Remove(t.Context()); err != nil {
				t.Error(err)
			}
		}
		if pids, err := c.Pids(); len(pids) != 0 || err != nil {
			t.Errorf("Pids() after Remove = %v, %v; want none", pids, err)
		}
		if err := c.Add(os.Getpid()); err == nil {
			t.Error("Add() after Remove: no error")
		}
	})
}

func zombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || bytes.Contains(b, []byte(") Z "))
}

// TestStartIsAtomic has the program itself read where it is: it never ran
// anywhere else. The thread that started it is where it was.
func TestStartIsAtomic(t *testing.T) {
	each(t, func(t *testing.T, _ []hierarchy, c *Cgroup) {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		before, err := os.ReadFile("/proc/thread-self/cgroup")
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		cmd := exec.Command("cat", "/proc/self/cgroup")
		cmd.Stdout = &out
		if err := c.Start(cmd); err != nil {
			t.Fatal(err)
		}
		after, err := os.ReadFile("/proc/thread-self/cgroup")
		if !bytes.Equal(before, after) || err != nil {
			t.Errorf("the thread was in %q and is in %q, error %v", before, after, err)
		}
		if err := cmd.Wait(); err != nil {
			t.Fatal(err)
		}
		if got, want := strings.Count(out.String(), ":"+c.Path()+"\n"), len(c.places); got != want {
			t.Errorf("the process was in the cgroup in %d hierarchies; want %d: %s", got, want, out.String())
		}
	})
}

func TestStartFailure(t *testing.T) {
	each(t, func(t *testing.T, _ []hierarchy, c *Cgroup) {
		if err := c.Start(exec.Command("/no/such/program")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("Start() = %v; want no such file", err)
		}
	})
}

func TestAddEndedProcess(t *testing.T) {
	each(t, func(t *testing.T, _ []hierarchy, c *Cgroup) {
		cmd := exec.Command("true")
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		if err := c.Add(cmd.Process.Pid); err != nil {
			t.Errorf("Add() of an ended process = %v; want nil", err)
		}
	})
}

func TestCreateRefusesOthersCgroup(t *testing.T) {
	each(t, func(t *testing.T, hs []hierarchy, c *Cgroup) {
		cmd := start(t, c, "exec sleep 1000")
		// Also when the processes are further down.
		for _, p := range []string{c.Path(), filepath.Dir(c.Path())} {
			_, err := create(hs, p, "")
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "container's cgroup is not empty: 1 process(es) found") {
				t.Errorf("create(%s) = %v; want it refused", p, err)
			}
		}
		if zombie(cmd.Process.Pid) {
			t.Error("the process of the cgroup was killed")
		}
	})
}

func TestRemoveWaitsForProcesses(t *testing.T) {
	each(t, func(t *testing.T, _ []hierarchy, c *Cgroup) {
		cmd := start(t, c, "exec sleep 1000")
		ctx, cancel := context.WithTimeoutCause(t.Context(), 30*time.Millisecond, errors.New("impatient"))
		defer cancel()
		err := c.Remove(ctx)
		want := ": impatient: 1 left, such as [" + strconv.Itoa(cmd.Process.Pid) + "]"
		if err == nil || !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), want) {
			t.Errorf("Remove() = %v; want busy%s", err, want)
		}
		removed := make(chan error, 1)
		go func() { removed <- c.Remove(t.Context()) }()
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := <-removed; err != nil {
			t.Errorf("Remove() = %v; want nil", err)
		}
	})
}

func TestKillForkingProcesses(t *testing.T) {
	each(t, func(t *testing.T, _ []hierarchy, c *Cgroup) {
		cmd := start(t, c, "while :; do sleep 0.01 & done")
		if err := c.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
		if pids, err := c.Pids(); len(pids) != 0 || err != nil {
			t.Errorf("Pids() after Kill = %v, %v; want none", pids, err)
		}
		if err := cmd.Wait(); err == nil {
			t.Error("the shell ended by itself")
		}
	})
}

// TestKillWithoutCgroupKill takes the way of kernels before 5.14.
func TestKillWithoutCgroupKill(t *testing.T) {
	each(t, func(t *testing.T, _ []hierarchy, c *Cgroup) {
		start(t, c, "sleep 1000 & sleep 1000")
		for _, p := range c.places {
			p.v2 = false
			backoff := minBackoff
			for {
				pids, err := p.pids()
				if err != nil {
					t.Fatal(err)
				}
				if len(pids) == 0 {
					break
				}
				if err := errors.Join(p.kill(), p.awaitChange(t.Context(), &backoff)); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

func TestKillFrozen(t *testing.T) {
	each(t, func(t *testing.T, _ []hierarchy, c *Cgroup) {
		start(t, c, "exec sleep 1000")
		for _, p := range c.places {
			var err error
			switch {
			case p.v2:
				err = write(p.dir, "cgroup.freeze", "1")
			case p.has("freezer"):
				err = write(p.dir, "freezer.state", "FROZEN")
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Kill(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestRemoveTree(t *testing.T) {
	each(t, func(t *testing.T, _ []hierarchy, c *Cgroup) {
		for _, p := range c.places {
			if err := os.MkdirAll(filepath.Join(p.dir, "a/b/c"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.MkdirAll(filepath.Join(p.dir, "a/d"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestStats(t *testing.T) {
	each(t, func(t *testing.T, _ []hierarchy, c *Cgroup) {
		start(t, c, "i=0; while :; do i=$((i+1)); done")
		counted := func(controller string) bool {
			return slices.ContainsFunc(c.places, func(p place) bool {
				b, _ := os.ReadFile(filepath.Join(p.dir, "cgroup.controllers"))
				return p.has(controller) || slices.Contains(strings.Fields(string(b)), controller)
			})
		}
		cpu := c.places[0].v2 || counted("cpuacct")
		deadline := time.Now().Add(20 * time.Second)
		for {
			s, err := c.Stats()
			if err != nil {
				t.Fatal(err)
			}
			ok := (!cpu || s.CPUTotal > 50*time.Millisecond && s.CPUUser > 0) &&
				(!counted("memory") || s.Memory > 0 && s.MemoryLimit < NoLimit) &&
				(!counted("pids") || s.Pids == 1)
			if ok {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("Stats() = %+v; want CPU time, and what is counted", s)
			}
		}
		if err := errors.Join(c.Kill(t.Context()), c.Remove(t.Context())); err != nil {
			t.Fatal(err)
		}
		if s, err := c.Stats(); err != nil || s != (Stats{}) {
			t.Errorf("Stats() after Remove = %+v, %v; want zeros", s, err)
		}
	})
}

func TestDefaultParentGoesWithLastPod(t *testing.T) {
	for kind, hs := range kinds(t) {
		t.Run(kind, func(t *testing.T) {
			if slices.ContainsFunc(placesOf(hs, defaultParent), place.exists) {
				t.Skip(defaultParent + " is in use")
			}
			for _, id := range []string{"one", "two"} {
				c, err := create(hs, "", id)
				if err != nil {
					t.Fatal(err)
				}
				if want := defaultParent + "/" + id; c.Path() != want {
					t.Errorf("Path() = %s; want %s", c.Path(), want)
				}
				defer func() {
					if err := c.Remove(t.Context()); err != nil {
						t.Error(err)
					}
					gone := !slices.ContainsFunc(placesOf(hs, defaultParent), place.exists)
					if want := id == "one"; gone != want {
						t.Errorf("after the removal of %s: %s gone = %t; want %t", id, defaultParent, gone, want)
					}
				}()
			}
		})
	}
}

// TestUnusableHierarchies leaves out what cannot be used.
func TestUnusableHierarchies(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := create([]hierarchy{{root: file, controllers: []string{"cpu"}}}, "/a/b", "")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"cgroup v1 cpu has no /a/b: lstat " + file + "/a/b: not a directory",
		"no cgroup hierarchy has /a/b",
	}
	if diff := cmp.Diff(want, c.Warnings()); diff != "" {
		t.Errorf("Warnings() (-want +got):\n%s", diff)
	}
	pids, err := c.Pids()
	if len(pids) > 0 || err != nil {
		t.Errorf("Pids() = %v, %v; want none", pids, err)
	}
	cmd := exec.Command("true")
	if err := c.Start(cmd); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait()
	if err := errors.Join(c.Kill(t.Context()), c.Remove(t.Context())); err != nil {
		t.Error(err)
	}
}

// TestLoadGone loads what was never there.
func TestLoadGone(t *testing.T) {
	c, err := Load(fmt.Sprintf("/vmrt-test-%d-gone", os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(c.Kill(t.Context()), c.Remove(t.Context())); err != nil {
		t.Error(err)
	}
}

func BenchmarkStart(b *testing.B) {
	c, err := Create("", fmt.Sprintf("bench-%d", os.Getpid()))
	if err != nil {
		b.Fatal(err)
	}
	defer c.Remove(context.Background())
	if len(c.places) == 0 {
		b.Skip("no cgroup can be made")
	}
	for name, start := range map[string]func(*exec.Cmd) error{
		"plain":  (*exec.Cmd).Start,
		"cgroup": func(cmd *exec.Cmd) error { return c.Start(cmd) },
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				cmd := exec.Command("sleep", "0")
				if err := start(cmd); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				_ = cmd.Wait()
				b.StartTimer()
			}
		})
	}
}
