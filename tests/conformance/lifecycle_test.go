package conformance

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/google/go-cmp/cmp"
)

func TestLifecycle(t *testing.T) {
	s := newShim(t, args("sh", "-c", "echo out; echo err >&2; uname -r; exit 7"))
	st := newStreams(t, false, false)
	begin := time.Now()
	pid := s.mustCreate(st, false)
	checkState(t, s, task.Status_CREATED)
	if got := s.mustStart(""); got != pid {
		t.Errorf("Start = pid %d; want Create's %d", got, pid)
	}
	if got := s.wait(""); got != 7 {
		t.Errorf("exit status = %d; want 7", got)
	}
	checkState(t, s, task.Status_STOPPED)
	out := st.out.String()
	if !strings.HasPrefix(out, "out\n") {
		t.Errorf("stdout = %q; want out first", out)
	}
	var uts syscall.Utsname
	if err := syscall.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	host := make([]byte, 0, len(uts.Release))
	for _, c := range uts.Release {
		if c == 0 {
			break
		}
		host = append(host, byte(c))
	}
	if strings.Contains(out, string(host)) {
		t.Errorf("the container runs on the host's kernel %s", host)
	}
	if got := st.err.String(); got != "err\n" {
		t.Errorf("stderr = %q; want err", got)
	}
	d := s.delete("")
	if d.ExitStatus != 7 || d.Pid != pid {
		t.Errorf("Delete = status %d, pid %d; want 7, %d", d.ExitStatus, d.Pid, pid)
	}
	checkEvents(t, s, pid)
	exit := waitFor(t, s.events, func(e *eventsapi.TaskExit) bool { return e.ID == s.id })
	deleted := waitFor(t, s.events, func(e *eventsapi.TaskDelete) bool { return e.ContainerID == s.id })
	at := exit.ExitedAt.AsTime()
	if at.Before(begin) || at.After(time.Now()) {
		t.Errorf("exit event says %v; want a time since %v", at, begin)
	}
	if !d.ExitedAt.AsTime().Equal(at) || !deleted.ExitedAt.AsTime().Equal(at) {
		t.Errorf("exited at %v by Delete, %v by its event; want %v, as the exit event says", d.ExitedAt.AsTime(), deleted.ExitedAt.AsTime(), at)
	}
	checkBootLog(t, s)
}

// checkBootLog wants what was booted, on what and why in the log.
func checkBootLog(t *testing.T, s *shim) {
	t.Helper()
	accelerator, err := measured()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`level=info msg="virtual machine is ready" accelerator=` + string(accelerator) + " ",
		" kernel=" + checkedKernel(t) + " ", " reason=", " vsock=",
	} {
		if !strings.Contains(s.log.String(), want) {
			t.Errorf("the log lacks %q", want)
		}
	}
}

func checkState(t *testing.T, s *shim, want task.Status) {
	t.Helper()
	st, err := s.task.State(s.call(), &taskapi.StateRequest{ID: s.id})
	if err != nil {
		t.Fatal(err)
	}
	if st.Status != want || st.ID != s.id || st.Bundle != s.bundle {
		t.Errorf("State = %v, id %s, bundle %s; want %v, %s, %s", st.Status, st.ID, st.Bundle, want, s.id, s.bundle)
	}
}

// checkEvents wants the events of one container's life, in order.
func checkEvents(t *testing.T, s *shim, pid uint32) {
	t.Helper()
	waitFor(t, s.events, func(e *eventsapi.TaskDelete) bool { return e.ContainerID == s.id })
	all, _ := s.events.list()
	var got []string
	for _, ev := range all {
		switch e := ev.(type) {
		case *eventsapi.TaskCreate:
			got = append(got, fmt.Sprintf("create %s %d", e.ContainerID, e.Pid))
		case *eventsapi.TaskStart:
			got = append(got, fmt.Sprintf("start %s %d", e.ContainerID, e.Pid))
		case *eventsapi.TaskExit:
			got = append(got, fmt.Sprintf("exit %s %s %d %d", e.ContainerID, e.ID, e.Pid, e.ExitStatus))
		case *eventsapi.TaskDelete:
			got = append(got, fmt.Sprintf("delete %s %d %d", e.ContainerID, e.Pid, e.ExitStatus))
		}
	}
	want := []string{
		fmt.Sprintf("create %s %d", s.id, pid), fmt.Sprintf("start %s %d", s.id, pid),
		fmt.Sprintf("exit %s %s %d 7", s.id, s.id, pid), fmt.Sprintf("delete %s %d 7", s.id, pid),
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("events =\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestPidIsSafe(t *testing.T) {
	s := newShim(t, options{spec: sleeper, rootfs: files(map[string]string{"only-here": ""})})
	pid := s.mustCreate(nil, false)
	s.mustStart("")
	root := fmt.Sprintf("/proc/%d/root", pid)
	if _, err := os.Stat(root + "/only-here"); err != nil {
		t.Errorf("the root of pid %d is not the container's: %v", pid, err)
	}
	if _, err := os.Stat(root + s.dir); err == nil {
		t.Errorf("the root of pid %d has the host's %s", pid, s.dir)
	}
	// It is in the pod's network.
	pod, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", s.findVM()))
	if err != nil {
		t.Fatal(err)
	}
	if net, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid)); err != nil || net != pod {
		t.Errorf("pid %d's network namespace = %s, %v; the virtual machine's is %s", pid, net, err, pod)
	}
	for _, ns := range []string{"pid", "mnt", "ipc", "uts", "net"} {
		own, _ := os.Readlink("/proc/self/ns/" + ns)
		theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
		if err != nil || own == theirs {
			t.Errorf("pid %d's %s namespace = %s, %v; the host's is %s", pid, ns, theirs, err, own)
		}
	}
	pids, err := s.task.Pids(s.call(), &taskapi.PidsRequest{ID: s.id})
	if err != nil || len(pids.Processes) != 1 || pids.Processes[0].Pid != pid {
		t.Errorf("Pids = %v, %v; want %d", pids, err, pid)
	}
}

func TestExec(t *testing.T) {
	s := newShim(t, args("sleep", "1000"))
	pid := s.mustCreate(nil, false)
	s.mustStart("")
	out, errs, status := s.exec("e1", "sh", "-c", "echo $0 hello; echo oops >&2; exit 3", "arg")
	if out != "arg hello\n" || errs != "oops\n" || status != 3 {
		t.Errorf("exec = %q, %q, %d; want arg hello, oops, 3", out, errs, status)
	}

	// Its events name it, and the container's process on the host.
	if err := s.addExec("e2", nil, false, "sh", "-c", "exit 4"); err != nil {
		t.Fatal(err)
	}
	if got := s.mustStart("e2"); got != pid {
		t.Errorf("Start of an exec = pid %d; want the container's, %d", got, pid)
	}
	s.wait("e2")
	s.delete("e2")
	waitFor(t, s.events, func(e *eventsapi.TaskExit) bool { return e.ID == "e2" })
	all, _ := s.events.list()
	var got []string
	for _, ev := range all {
		switch e := ev.(type) {
		case *eventsapi.TaskExecAdded:
			got = append(got, fmt.Sprintf("added %s %s", e.ContainerID, e.ExecID))
		case *eventsapi.TaskExecStarted:
			got = append(got, fmt.Sprintf("started %s %s %d", e.ContainerID, e.ExecID, e.Pid))
		case *eventsapi.TaskExit:
			got = append(got, fmt.Sprintf("exit %s %s %d %d", e.ContainerID, e.ID, e.Pid, e.ExitStatus))
		}
	}
	var want []string
	for _, id := range []string{"e1", "e2"} {
		status := map[string]int{"e1": 3, "e2": 4}[id]
		want = append(want, fmt.Sprintf("added %s %s", s.id, id), fmt.Sprintf("started %s %s %d", s.id, id, pid),
			fmt.Sprintf("exit %s %s %d %d", s.id, id, pid, status))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("events of execs (-want +got):\n%s", diff)
	}
}
