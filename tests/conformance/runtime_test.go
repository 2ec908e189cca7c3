package conformance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/hack/tools"
)

// runcRuntime is containerd's own shim over runc, which says how a shim answers.
func runcRuntime(t testing.TB) *runtime {
	t.Helper()
	requireVM(t)
	paths := map[string]string{}
	for tool, program := range map[string]string{"containerd": "containerd-shim-runc-v2", "runc": "runc"} {
		dir, err := tools.Build(context.Background(), tool, os.Stderr)
		if err != nil {
			t.Fatal(err)
		}
		paths[program] = filepath.Join(dir, program)
	}
	options, err := typeurl.MarshalAnyToProto(&runcoptions.Options{BinaryName: paths["runc"]})
	if err != nil {
		t.Fatal(err)
	}
	return &runtime{binary: paths["containerd-shim-runc-v2"], options: options}
}

// request is one call about a container, or about its exec "e".
type request struct {
	name string
	call func(*shim) error
}

func (s *shim) pause() error {
	_, err := s.task.Pause(s.call(), &taskapi.PauseRequest{ID: s.id})
	return err
}

func (s *shim) resume() error {
	_, err := s.task.Resume(s.call(), &taskapi.ResumeRequest{ID: s.id})
	return err
}

func (s *shim) update(r *specs.LinuxResources) error {
	encoded, err := typeurl.MarshalAnyToProto(r)
	if err != nil {
		s.t.Fatal(err)
	}
	_, err = s.task.Update(s.call(), &taskapi.UpdateTaskRequest{ID: s.id, Resources: encoded})
	return err
}

func state(exec string) request {
	return request{"State " + exec, func(s *shim) error {
		_, err := s.task.State(s.call(), &taskapi.StateRequest{ID: s.id, ExecID: exec})
		return err
	}}
}

func start(exec string) request {
	return request{"Start " + exec, func(s *shim) error {
		_, err := s.task.Start(s.call(), &taskapi.StartRequest{ID: s.id, ExecID: exec})
		return err
	}}
}

func kill(exec string, signal syscall.Signal, all bool) request {
	return request{fmt.Sprintf("Kill %s %d all=%t", exec, signal, all), func(s *shim) error {
		_, err := s.task.Kill(s.call(), &taskapi.KillRequest{ID: s.id, ExecID: exec, Signal: uint32(signal), All: all})
		return err
	}}
}

func wait(exec string) request {
	return request{"Wait " + exec, func(s *shim) error {
		_, err := s.task.Wait(s.call(), &taskapi.WaitRequest{ID: s.id, ExecID: exec})
		return err
	}}
}

func remove(exec string) request {
	return request{"Delete " + exec, func(s *shim) error {
		_, err := s.task.Delete(s.call(), &taskapi.DeleteRequest{ID: s.id, ExecID: exec})
		return err
	}}
}

func resize(exec string) request {
	return request{"ResizePty " + exec, func(s *shim) error {
		_, err := s.task.ResizePty(s.call(), &taskapi.ResizePtyRequest{ID: s.id, ExecID: exec, Width: 80, Height: 25})
		return err
	}}
}

func addExec(exec string) request {
	return request{"Exec " + exec, func(s *shim) error { return s.addExec(exec, nil, false, "sleep", "1000") }}
}

var (
	create  = request{"Create", func(s *shim) error { _, err := s.create(nil, false); return err }}
	pause   = request{"Pause", (*shim).pause}
	resume  = request{"Resume", (*shim).resume}
	closeIO = request{"CloseIO", func(s *shim) error {
		_, err := s.task.CloseIO(s.call(), &taskapi.CloseIORequest{ID: s.id, Stdin: true})
		return err
	}}
	pids   = request{"Pids", func(s *shim) error { _, err := s.task.Pids(s.call(), &taskapi.PidsRequest{ID: s.id}); return err }}
	stats  = request{"Stats", func(s *shim) error { _, err := s.task.Stats(s.call(), &taskapi.StatsRequest{ID: s.id}); return err }}
	update = request{"Update", func(s *shim) error {
		l := int64(100)
		return s.update(&specs.LinuxResources{Pids: &specs.LinuxPids{Limit: &l}})
	}}
	connect   = request{"Connect", func(s *shim) error { _, err := s.task.Connect(s.call(), &taskapi.ConnectRequest{ID: s.id}); return err }}
	badUpdate = request{"Update bad", func(s *shim) error {
		quota := int64(1)
		return s.update(&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: &quota}})
	}}
	badExec = request{"Exec bad", func(s *shim) error { return s.addExecSpec("bad", nil, &specs.Process{}) }}
)

// conversations are requests in order, each to a container of its own: what is
// asked of a container in every state.
var conversations = []struct {
	name     string
	requests []request
}{
	{"not created", []request{
		state(""), start(""), pids, pause, resume, kill("", 9, false), addExec("e"), resize(""), closeIO, update, stats,
		wait(""), remove(""), connect,
	}},
	{"created", []request{
		create, create, state(""), state("e"), pids, pause, resume, resize(""), closeIO, update, stats,
		start("e"), kill("e", 9, false), wait("e"), remove("e"), resize("e"), remove(""), remove(""), state(""),
	}},
	{"killed before start", []request{create, kill("", 9, false), wait(""), start(""), remove("")}},
	{"running", []request{
		create, start(""), start(""), state(""), pids, resume, resize(""), closeIO, update, badUpdate, stats, remove(""), create,
		kill("", 0, false), kill("", 9, false), wait(""), wait(""),
	}},
	{"paused", []request{
		create, start(""), addExec("before"), pause, pause, state(""), pids, stats, update, addExec("e"), start(""), start("before"),
		remove(""), resume, resume, state(""), addExec("e"), start("e"), kill("", 9, false), wait("e"), wait(""),
	}},
	{"stopped", []request{
		create, start(""), addExec("never"), kill("", 9, false), wait(""), wait(""),
		state(""), start(""), pause, resume, kill("", 9, false), kill("", 9, true), addExec("e"), resize(""), closeIO, update, stats,
		start("never"), kill("never", 9, false), remove("never"),
		remove(""), remove(""), state(""), wait(""), kill("", 9, false),
	}},
	{"killed while paused", []request{create, start(""), pause, kill("", 9, false), wait(""), state(""), remove("")}},
	{"exec", []request{
		create, start(""), addExec("e"), addExec("e"), badExec, state("e"), resize("e"), kill("e", 9, false),
		start("e"), state("e"), resize("e"), remove("e"), kill("e", 15, false), wait("e"), wait("e"),
		state("e"), resize("e"), kill("e", 9, false), addExec("e"), remove("e"), remove("e"), state("e"), addExec("e"), remove("e"),
	}},
	{"exec before start", []request{create, addExec("e"), start("e"), state("e"), start(""), kill("e", 9, false), wait("e"), remove("e")}},
	{"exec outlived", []request{
		create, start(""), addExec("e"), addExec("never"), start("e"), kill("", 9, false), wait(""), wait("e"),
		state("e"), state("never"), start("never"), remove("e"), remove(""),
	}},
	{"kill all", []request{create, start(""), addExec("e"), start("e"), kill("", 9, true), wait("e"), wait(""), remove("e"), remove("")}},
}

// answer is how a request ended.
type answer struct {
	ok      bool
	kind    string
	message string
}

func (a answer) String() string {
	if a.ok {
		return "ok"
	}
	return a.kind + ": " + a.message
}

func ask(s *shim, r request) answer {
	err := errgrpc.ToNative(r.call(s))
	if err == nil {
		return answer{ok: true}
	}
	kind := kindOf(err)
	message := strings.ReplaceAll(err.Error(), s.id, "ID")
	return answer{kind: kind, message: strings.TrimSuffix(message, ": "+kind)}
}

func kindOf(err error) string {
	for _, k := range []error{
		errdefs.ErrNotFound, errdefs.ErrAlreadyExists, errdefs.ErrFailedPrecondition, errdefs.ErrInvalidArgument,
		errdefs.ErrNotImplemented, errdefs.ErrUnavailable, errdefs.ErrInternal,
	} {
		if errors.Is(err, k) {
			return k.Error()
		}
	}
	return "unknown"
}

// asRunc reports whether got is an answer as runc's: the same words, and the
// same kind of error, or one where runc's shim has none. What the OCI runtimes
// themselves say of an error differs from one to the next.
func (got answer) asRunc(want answer) bool {
	if got.ok || want.ok {
		return got.ok == want.ok
	}
	if got.kind != want.kind && want.kind != "unknown" {
		return false
	}
	return got.message == want.message || strings.Contains(want.message, "runc") || strings.Contains(want.message, "OCI runtime")
}

// TestAnswersAsRunc holds every request in every state to containerd's own shim.
func TestAnswersAsRunc(t *testing.T) {
	control := newShim(t, options{runtime: runcRuntime(t)})
	s := newShim(t, options{})
	for _, c := range conversations {
		t.Run(c.name, func(t *testing.T) {
			runc, vmrt := control.add(t, options{spec: sleeper}), s.add(t, options{spec: sleeper})
			for _, r := range c.requests {
				want, got := ask(runc, r), ask(vmrt, r)
				t.Logf("%s = %v", r.name, got)
				if !got.asRunc(want) {
					t.Errorf("%s = %v; runc's shim: %v", r.name, got, want)
				}
			}
		})
	}
}

// A second Start of an exec is an error, and the exec goes on. (runc's shim
// answers the same, and panics when init ends.)
func TestStartTwice(t *testing.T) {
	s := newShim(t, args("sleep", "1000"))
	s.mustCreate(nil, false)
	s.mustStart("")
	if err := s.addExec("e", nil, false, "sleep", "1000"); err != nil {
		t.Fatal(err)
	}
	// Together and afterwards: one wins.
	results := make(chan answer)
	for range 4 {
		go func() { results <- ask(s, start("e")) }()
	}
	won := 0
	for range 4 {
		if a := <-results; a.ok {
			won++
		} else if a.message != "cannot start a running process" {
			t.Errorf("Start = %v; want cannot start a running process", a)
		}
	}
	if won != 1 {
		t.Errorf("%d of 4 Starts of one exec succeeded; want 1", won)
	}
	if a := ask(s, start("e")); a.ok {
		t.Error("Start of a running exec = nil; want an error")
	}
	if a := ask(s, kill("e", 9, false)); !a.ok {
		t.Errorf("Kill = %v; want nil", a)
	}
	if got := s.wait("e"); got != 137 {
		t.Errorf("exit status = %d; want 137", got)
	}
	if a := ask(s, start("e")); a.message != "cannot start a stopped process" {
		t.Errorf("Start of a stopped exec = %v; want cannot start a stopped process", a)
	}
	s.kill(9, false)
	if got := s.wait(""); got != 137 {
		t.Errorf("exit status of init = %d; want 137", got)
	}
}

func sleeper(s *specs.Spec) { s.Process.Args = []string{"sleep", "1000"} }
