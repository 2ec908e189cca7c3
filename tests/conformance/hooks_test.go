package conformance

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// hookDir is where hooks leave what they saw.
type hookDir struct {
	t   testing.TB
	dir string
}

// hook writes the state that it got, and the network namespace that the
// state's pid leads to, and then does what more says.
func (h hookDir) hook(name, more string) specs.Hook {
	script := fmt.Sprintf(`cd %[1]s; echo %[2]s >> order; cat > %[2]s; echo "$MARK $0 $1" > %[2]s.env
pid=$(sed -n 's/.*"pid":\([0-9]*\).*/\1/p' %[2]s); readlink /proc/$pid/ns/net > %[2]s.net; true; %[3]s`, h.dir, name, more)
	return specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", script, "zero", "one"}, Env: []string{"PATH=/bin:/usr/bin", "MARK=set"}}
}

func (h hookDir) read(name string) string {
	b, err := os.ReadFile(filepath.Join(h.dir, name))
	if err != nil {
		h.t.Errorf("hook did not run: %v", err)
	}
	return strings.TrimSpace(string(b))
}

// state returns what a hook was told.
func (h hookDir) state(name string) specs.State {
	var st specs.State
	if err := json.Unmarshal([]byte(h.read(name)), &st); err != nil {
		h.t.Errorf("hook %s got no state: %v", name, err)
	}
	return st
}

// hooksSeen is what a container's hooks saw in its life.
type hooksSeen struct {
	Order, Inside      string
	Status             map[string]specs.ContainerState
	Env                map[string]string
	Same, NetNS, NoPid bool
}

// Every hook runs when and with what it does with runc.
func TestHooks(t *testing.T) {
	live := func(t *testing.T, s *shim) hooksSeen {
		h := hookDir{t, t.TempDir()}
		c := s.add(t, options{spec: func(spec *specs.Spec) {
			// The shell runs once the startContainer hooks have.
			spec.Process.Args = []string{"sh", "-c", "echo started; exec sleep 1000"}
			spec.Annotations = map[string]string{"example.org/key": "value"}
			//lint:ignore SA1019 deprecated, and still in use
			spec.Hooks = &specs.Hooks{Prestart: []specs.Hook{h.hook("prestart", ""), h.hook("prestart2", "")}}
			spec.Hooks.CreateRuntime = []specs.Hook{h.hook("createRuntime", "")}
			spec.Hooks.Poststart = []specs.Hook{h.hook("poststart", "")}
			spec.Hooks.Poststop = []specs.Hook{h.hook("poststop", ""), h.hook("poststop2", "")}
			// In the container, whose root file system is this one's.
			spec.Hooks.StartContainer = []specs.Hook{{
				Path: "/bin/sh", Args: []string{"sh", "-c", `cat > /start; hostname > /inside`}, Env: []string{"PATH=/bin"},
			}}
		}})
		st := newStreams(t, false, false)
		pid := c.mustCreate(st, false)
		net, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
		if err != nil {
			t.Fatal(err)
		}
		own, err := os.Readlink("/proc/self/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		c.mustStart("")
		st.out.waitFor(t, "started")
		inside := hookDir{t, filepath.Join(c.bundle, "rootfs")}
		start := inside.state("start")
		seen := hooksSeen{
			Inside: inside.read("inside"), NetNS: true, Same: true,
			Status: map[string]specs.ContainerState{"startContainer": start.Status}, Env: map[string]string{},
		}
		c.kill(9, false)
		c.wait("")
		c.delete("")
		seen.Order = h.read("order")
		for _, name := range []string{"prestart", "prestart2", "createRuntime", "poststart", "poststop", "poststop2"} {
			st := h.state(name)
			seen.Status[name] = st.Status
			seen.Env[name] = h.read(name + ".env")
			same := st.ID == c.id && st.Bundle == c.bundle && st.Version != "" && st.Annotations["example.org/key"] == "value"
			seen.Same = seen.Same && same
			if strings.HasPrefix(name, "poststop") {
				seen.NoPid = st.Pid == 0
				continue
			}
			seen.NetNS = seen.NetNS && st.Pid == int(pid) && h.read(name+".net") == net && net != own
		}
		return seen
	}
	want := live(t, newShim(t, options{runtime: runcRuntime(t)}))
	got := live(t, newShim(t, options{}))
	if !want.Same || !want.NetNS {
		t.Errorf("runc's hooks saw %+v; want their container and its network namespace", want)
	}
	// runc runs poststart hooks at the creation (docs/differences.md), and the
	// guest's OCI runtime has a word of its own for a container whose
	// startContainer hooks run.
	want.Status["poststart"], want.Status["startContainer"] = specs.StateRunning, "starting"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("hooks of runc (-) and vmrt (+) saw:\n%s", diff)
	}
}

// A hook that fails ends what it belongs to as it does with runc.
func TestFailingHooks(t *testing.T) {
	control := newShim(t, options{runtime: runcRuntime(t)})
	s := newShim(t, options{})
	s.running(t, options{spec: sleeper}) // keeps the virtual machine
	type end struct {
		Create, Start bool // whether they succeeded
		Status        uint32
		Poststop      string
	}
	for _, tc := range []struct {
		name  string
		phase string // of the error
		set   func(*specs.Hooks, []specs.Hook)
	}{
		//lint:ignore SA1019 deprecated, and still in use
		{"prestart", "prestart hook #1", func(h *specs.Hooks, l []specs.Hook) { h.Prestart = l }},
		{"createRuntime", "createRuntime hook #1", func(h *specs.Hooks, l []specs.Hook) { h.CreateRuntime = l }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			live := func(s *shim) (e end) {
				h := hookDir{t, t.TempDir()}
				c := s.add(t, options{spec: func(spec *specs.Spec) {
					sleeper(spec)
					spec.Hooks = &specs.Hooks{Poststop: []specs.Hook{h.hook("poststop", "")}}
					tc.set(spec.Hooks, []specs.Hook{h.hook("first", ""), h.hook("failing", "echo no luck >&2; exit 7"), h.hook("never", "")})
				}})
				_, err := c.create(nil, false)
				if e.Create = err == nil; e.Create {
					_, err = c.task.Start(c.call(), &taskapi.StartRequest{ID: c.id})
					e.Start = err == nil
					e.Status = c.wait("")
					c.delete("")
				}
				if err == nil || !strings.Contains(err.Error(), tc.phase) || !strings.Contains(err.Error(), "no luck") {
					t.Errorf("error of %s = %v; want %q and the hook's words in it", tc.name, err, tc.phase)
				}
				e.Poststop = h.read("order")
				return e
			}
			want, got := live(control), live(s)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("runc (-) and vmrt (+) differ:\n%s", diff)
			}
		})
	}
	t.Run("startContainer", func(t *testing.T) {
		live := func(s *shim) (e end) {
			c := s.add(t, options{spec: func(spec *specs.Spec) {
				sleeper(spec)
				spec.Hooks = &specs.Hooks{StartContainer: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "exit 7"}}}}
			}})
			c.mustCreate(nil, false)
			_, err := c.task.Start(c.call(), &taskapi.StartRequest{ID: c.id})
			e.Create, e.Start = true, err == nil
			// runc's init ends with 255, crun's with 1.
			if c.wait("") == 0 {
				t.Error("exit status = 0; want another")
			}
			return e
		}
		want, got := live(control), live(s)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("runc (-) and vmrt (+) differ:\n%s", diff)
		}
	})
	// As the OCI spec has it: runc runs poststart hooks before the container
	// has started, so that they fail its Create.
	t.Run("poststart", func(t *testing.T) {
		h := hookDir{t, t.TempDir()}
		c := s.add(t, options{spec: func(spec *specs.Spec) {
			sleeper(spec)
			spec.Hooks = &specs.Hooks{
				Poststart: []specs.Hook{h.hook("failing", "echo no luck >&2; exit 7"), h.hook("never", "")},
				Poststop:  []specs.Hook{h.hook("poststop", "")},
			}
		}})
		c.mustCreate(nil, false)
		_, err := c.task.Start(c.call(), &taskapi.StartRequest{ID: c.id})
		if err == nil || !strings.Contains(err.Error(), "poststart hook #0") || !strings.Contains(err.Error(), "no luck") {
			t.Errorf("Start = %v; want poststart hook #0 and its words in it", err)
		}
		if got := c.wait(""); got != 137 {
			t.Errorf("exit status = %d; want 137", got)
		}
		c.delete("")
		if got := h.read("order"); got != "failing\npoststop" {
			t.Errorf("hooks ran in order %q; want failing, poststop", got)
		}
	})
	// As the OCI spec has it: runc fails Delete.
	t.Run("poststop", func(t *testing.T) {
		h := hookDir{t, t.TempDir()}
		c := s.add(t, options{spec: func(spec *specs.Spec) {
			spec.Hooks = &specs.Hooks{Poststop: []specs.Hook{h.hook("failing", "exit 7"), h.hook("second", "")}}
		}})
		c.mustCreate(nil, false)
		c.delete("")
		if got := h.read("order"); got != "failing\nsecond" {
			t.Errorf("hooks ran in order %q; want failing, second", got)
		}
	})
}
