package cri

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
)

// TestFeatures is what Kubernetes makes of the CRI: probes, graceful stops,
// statistics, debug containers. critest has what a security context says.
func TestFeatures(t *testing.T) {
	inModes(t, func(t *testing.T, e *env.Env) {
		// The statistics of podsandbox are those of the parent.
		p := runPod(t, e, "pod", env.Object{"linux": env.Object{"cgroup_parent": "/vmrt"}})
		stays := p.run("stays", "exec sleep 1000")
		for _, tc := range []struct {
			name string
			test func(p *pod, id string)
		}{
			{"probes", probes},
			{"grace period", gracePeriod},
			{"stop signal", stopSignal},
			{"out of memory", outOfMemory},
			{"termination message", terminationMessage},
			{"target's processes", targetsProcesses},
			{"update", updateResources},
			{"statistics", statistics},
			{"image file system", imageFileSystem},
		} {
			t.Run(tc.name, func(t *testing.T) { tc.test(&pod{Pod: p.Pod, t: t, e: e, ctx: env.Context(t)}, stays) })
		}
	})
}

// probes are ExecSync requests: their result is the exit code.
func probes(p *pod, id string) {
	for _, code := range []int{0, 1, 2, 126, 255} {
		_, err := p.e.Crictl(p.ctx, "exec", "-s", id, "sh", "-c", fmt.Sprintf("exit %d", code)).Run()
		if want := fmt.Sprintf("exited with %d:", code); code == 0 && err != nil || code != 0 && (err == nil || !strings.Contains(err.Error(), want)) {
			p.t.Errorf("exec of exit %d = %v; want its exit code", code, err)
		}
	}
	for _, tc := range []struct{ name, want string }{
		{"no-such-program", "executable file not found in $PATH"}, {"/etc/passwd", "permission denied"},
	} {
		if _, err := p.e.Crictl(p.ctx, "exec", "-s", id, tc.name).Run(); err == nil || !strings.Contains(err.Error(), tc.want) {
			p.t.Errorf("exec of %s = %v; want %s", tc.name, err, tc.want)
		}
	}
	begin := time.Now()
	_, err := p.e.Crictl(p.ctx, "exec", "-s", "--timeout", "1", id, "sleep", "777").Run()
	if err == nil || !strings.Contains(err.Error(), "timeout") {
		p.t.Errorf("exec beyond its timeout = %v; want that it timed out", err)
	}
	if took := time.Since(begin); took < time.Second || took > patience {
		p.t.Errorf("exec with a timeout of 1s took %v", took)
	}
	if got := p.sh(id, "ps -o args | grep -c '^sleep 777$' || true"); got != "0" {
		p.t.Errorf("%s processes are left of an exec beyond its timeout; want none", got)
	}
}

// logged returns what a container has written, without CRI's time stamps.
func (p *pod) logged(name string) string {
	p.t.Helper()
	b, err := os.ReadFile(filepath.Join(p.LogDir, name+".log"))
	if err != nil {
		p.t.Error(err)
	}
	var out strings.Builder
	for line := range strings.Lines(string(b)) {
		_, text, _ := strings.Cut(line, " stdout F ")
		out.WriteString(text)
	}
	return out.String()
}

func (p *pod) awaitLog(name, want string) {
	p.t.Helper()
	for deadline := time.Now().Add(patience); !strings.Contains(p.logged(name), want); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("log of %s = %q; want %q in it", name, p.logged(name), want)
		}
	}
}

const deaf = "trap 'echo TERM' TERM; trap 'echo USR1; exit 4' USR1; echo ready; while :; do sleep 0.1; done"

// A container that does not end hears SIGTERM once, and is killed then.
func gracePeriod(p *pod, _ string) {
	id := p.run("deaf", deaf)
	p.awaitLog("deaf", "ready")
	begin := time.Now()
	p.crictl("stop", "--timeout", "3", id)
	if took := time.Since(begin); took < 3*time.Second {
		p.t.Errorf("container was killed after %v; want a grace period of 3s", took)
	}
	if c := p.awaitExit(id); c.Status.ExitCode != 137 {
		p.t.Errorf("exit code = %d; want 137", c.Status.ExitCode)
	}
	if got := p.logged("deaf"); got != "ready\nTERM\n" {
		p.t.Errorf("container has heard %q; want SIGTERM once", got)
	}
	p.crictl("stop", "--timeout", "3", id) // again
}

// usr1 is SIGNAL_SIGUSR1 of the CRI's Signal.
const usr1 = 29

func stopSignal(p *pod, _ string) {
	id, err := p.Pod.Run(p.ctx, "own-signal", image.BusyboxName, env.Object{"command": []string{"sh", "-c", deaf}, "stop_signal": usr1})
	if err != nil {
		p.t.Fatal(err)
	}
	p.awaitLog("own-signal", "ready")
	p.crictl("stop", "--timeout", "60", id)
	if c := p.awaitExit(id); c.Status.ExitCode != 4 || p.logged("own-signal") != "ready\nUSR1\n" {
		p.t.Errorf("container with a stop signal = %+v, which has heard %q; want SIGUSR1 and exit code 4", c, p.logged("own-signal"))
	}
}

func outOfMemory(p *pod, neighbour string) {
	id, err := p.Pod.Run(p.ctx, "greedy", image.BusyboxName, env.Object{
		"command": []string{"tail", "/dev/zero"},
		"linux":   env.Object{"resources": env.Object{"memory_limit_in_bytes": 32 << 20}},
	})
	if err != nil {
		p.t.Fatal(err)
	}
	if c := p.awaitExit(id); c.Status.ExitCode != 137 || c.Status.Reason != "OOMKilled" {
		p.t.Errorf("container that takes too much memory = %+v; want OOMKilled and exit code 137", c)
	}
	if got := p.inspect(neighbour).Status; got.State != "CONTAINER_RUNNING" {
		p.t.Errorf("neighbour = %+v; want it running", got)
	}
}

// terminationMessage is a file of kubelet's, mounted by itself.
func terminationMessage(p *pod, _ string) {
	file := filepath.Join(p.t.TempDir(), "message")
	if err := os.WriteFile(file, nil, 0o666); err != nil {
		p.t.Fatal(err)
	}
	id, err := p.Pod.Run(p.ctx, "failing", image.BusyboxName, env.Object{
		"command": []string{"sh", "-c", "echo no luck > /dev/termination-log; exit 7"},
		"mounts":  []env.Object{{"container_path": "/dev/termination-log", "host_path": file}},
	})
	if err != nil {
		p.t.Fatal(err)
	}
	if c := p.awaitExit(id); c.Status.ExitCode != 7 || c.Status.Reason != "Error" {
		p.t.Errorf("container = %+v; want exit code 7 and the reason Error", c)
	}
	if b, err := os.ReadFile(file); string(b) != "no luck\n" || err != nil {
		p.t.Errorf("termination message = %q, %v; want no luck", b, err)
	}
}

// targetsProcesses is what `kubectl debug --target` makes.
func targetsProcesses(p *pod, _ string) {
	const container, ofTarget = 1, 3 // of the CRI's NamespaceMode
	pid := func(mode int, target string) env.Object {
		return env.Object{"security_context": env.Object{"namespace_options": env.Object{"pid": mode, "target_id": target}}}
	}
	target, err := p.Pod.Run(p.ctx, "target", image.BusyboxName, env.Object{"command": []string{"sleep", "1234"}, "linux": pid(container, "")})
	if err != nil {
		p.t.Fatal(err)
	}
	id, err := p.Pod.Run(p.ctx, "debug", image.BusyboxName, env.Object{
		"command": []string{"sleep", "1000"},
		"linux":   pid(ofTarget, target),
	})
	if err != nil {
		p.t.Fatal(err)
	}
	if got := p.sh(id, "tr '\\0' ' ' < /proc/1/cmdline"); got != "sleep 1234" {
		p.t.Errorf("first process seen by a debug container = %q; want its target's", got)
	}
	p.crictl("rm", "--force", id)
	if got := p.sh(target, "echo alive"); got != "alive" {
		p.t.Errorf("target = %q after its debug container was removed; want alive", got)
	}
}

func updateResources(p *pod, id string) {
	p.crictl("update", "--memory", fmt.Sprint(96<<20), "--cpu-period", "100000", "--cpu-quota", "30000", "--cpu-share", "512", id)
	want := fmt.Sprint(96<<20) + "\n30000 100000\n20"
	if got := p.sh(id, "cd /sys/fs/cgroup; cat memory.max cpu.max cpu.weight"); got != want {
		p.t.Errorf("limits after an update = %q; want %q", got, want)
	}
}

// value is a number in crictl's JSON, where 64 bits are a string.
type value struct{ Value string }

func (v value) number(t *testing.T, what string) float64 {
	t.Helper()
	n, err := strconv.ParseFloat(v.Value, 64)
	if err != nil {
		t.Errorf("%s = %q: %v", what, v.Value, err)
	}
	return n
}

type containerStats struct {
	Attributes struct{ ID string }
	CPU        struct{ UsageCoreNanoSeconds value }
	Memory     struct{ WorkingSetBytes, UsageBytes value }
}

type podStats struct {
	Stats []struct {
		Linux struct {
			CPU     struct{ UsageCoreNanoSeconds value }
			Memory  struct{ WorkingSetBytes, UsageBytes value }
			Network struct {
				DefaultInterface struct {
					Name             string
					RxBytes, TxBytes value
				}
			}
			Process    struct{ ProcessCount value }
			Containers []containerStats
		}
	}
}

// statistics of a container are the guest's, of a pod the host's.
func statistics(p *pod, _ string) {
	id := p.run("busy", "dd if=/dev/zero of=/dev/shm/f bs=1M count=20; i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo ready; exec sleep 1000")
	p.awaitLog("busy", "ready")
	p.sh(id, "ping -c 3 -s 1000 $(ip route | awk '/^default/ { print $3 }')")
	var before, after podStats
	p.decode(&before, "statsp", "--id", p.ID, "-o", "json")
	p.sh(id, "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done")
	p.decode(&after, "statsp", "--id", p.ID, "-o", "json")
	if len(before.Stats) != 1 || len(after.Stats) != 1 {
		p.t.Fatalf("statistics of one pod = %+v, %+v", before, after)
	}
	s := after.Stats[0].Linux
	between := func(what string, v value, low, high float64) {
		p.t.Helper()
		if n := v.number(p.t, what); n < low || n > high {
			p.t.Errorf("%s = %.0f; want %.0f to %.0f", what, n, low, high)
		}
	}
	const mib = 1 << 20
	// QEMU and what it has touched of the guest's memory.
	between("pod's working set", s.Memory.WorkingSetBytes, 50*mib, 500*mib)
	between("pod's memory", s.Memory.UsageBytes, 50*mib, 700*mib)
	between("pod's CPU time", s.CPU.UsageCoreNanoSeconds, 0.5e9, 600e9)
	if x, y := before.Stats[0].Linux.CPU.UsageCoreNanoSeconds.number(p.t, "CPU time"), s.CPU.UsageCoreNanoSeconds.number(p.t, "CPU time"); y-x < 5e6 {
		p.t.Errorf("pod's CPU time has grown by %.0f ns while it worked", y-x)
	}
	if s.Network.DefaultInterface.Name != "eth0" {
		p.t.Errorf("pod's interface = %q; want eth0", s.Network.DefaultInterface.Name)
	}
	between("bytes received", s.Network.DefaultInterface.RxBytes, 3000, 100e6)
	between("bytes sent", s.Network.DefaultInterface.TxBytes, 3000, 100e6)
	between("pod's processes", s.Process.ProcessCount, 2, 100)

	var all struct{ Stats []containerStats }
	p.decode(&all, "stats", "--id", id, "-o", "json")
	for what, list := range map[string][]containerStats{"statsp": s.Containers, "stats": all.Stats} {
		found := false
		for _, c := range list {
			if c.Attributes.ID != id {
				continue
			}
			found = true
			between(what+": container's working set", c.Memory.WorkingSetBytes, 20*mib, 60*mib)
			between(what+": container's CPU time", c.CPU.UsageCoreNanoSeconds, 10e6, 600e9)
		}
		if !found {
			p.t.Errorf("%s has no statistics of container %s", what, id)
		}
	}
}

// decode runs a crictl command that prints JSON.
func (p *pod) decode(into any, args ...string) {
	p.t.Helper()
	out := p.crictl(args...)
	if err := json.Unmarshal([]byte(out), into); err != nil {
		p.t.Fatalf("crictl %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

func imageFileSystem(p *pod, _ string) {
	var info struct {
		Status struct {
			ImageFilesystems []struct {
				FsID      struct{ Mountpoint string }
				UsedBytes value
			}
		}
	}
	p.decode(&info, "imagefsinfo", "-o", "json")
	if fs := info.Status.ImageFilesystems; len(fs) == 0 || fs[0].FsID.Mountpoint == "" || fs[0].UsedBytes.number(p.t, "used bytes") == 0 {
		p.t.Errorf("imagefsinfo = %+v; want a file system that is used", info)
	}
}
