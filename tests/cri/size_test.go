package cri

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
)

// TestSize has virtual machines as large as their pods' limits.
func TestSize(t *testing.T) {
	inModes(t, func(t *testing.T, e *env.Env) {
		p := runPod(t, e, "large", env.Object{"linux": env.Object{
			// That of pods that name none, so that it goes with the last one.
			"cgroup_parent": "/vmrt",
			"resources":     env.Object{"cpu_period": 100000, "cpu_quota": 150000, "memory_limit_in_bytes": 600 << 20},
		}})
		id, err := p.Pod.Run(p.ctx, "one", image.BusyboxName, env.Object{
			"command": []string{"sleep", "1000"},
			"linux":   env.Object{"resources": env.Object{"memory_limit_in_bytes": 64 << 20}},
		})
		if err != nil {
			t.Fatal(err)
		}
		if got := p.sh(id, "nproc"); got != "2" {
			t.Errorf("nproc = %s; want 2", got)
		}
		if got := p.memory(id); got < 600 || got > 673 {
			t.Errorf("memory = %d MiB; want the limit and little more", got)
		}
		if got := p.sh(id, "cat /sys/fs/cgroup/memory.max"); got != fmt.Sprint(64<<20) {
			t.Errorf("the container's limit = %s; want 64 MiB", got)
		}
		p.crictl("update", "--memory", fmt.Sprint(96<<20), id)
		if got := p.sh(id, "cat /sys/fs/cgroup/memory.max"); got != fmt.Sprint(96<<20) {
			t.Errorf("the container's limit = %s; want 96 MiB", got)
		}
		if got := p.crictl("statsp", "--id", p.ID, "-o", "json"); !strings.Contains(got, "workingSetBytes") {
			t.Errorf("pod's statistics = %s; want its memory", got)
		}
	})
}

// TestOverhead has the overhead of a pod's RuntimeClass make its virtual machine
// larger. Of the two ways to learn of it each mode has one: the pod's
// configuration, and the pod's cgroup, which is made as the kubelet does.
func TestOverhead(t *testing.T) {
	const limit, overhead = 600, 400
	inModes(t, func(t *testing.T, e *env.Env) {
		makeCgroup(t, e, "/kubepods-pod1", (limit+overhead)<<20)
		p := runPod(t, e, "overhead", env.Object{"linux": env.Object{
			"cgroup_parent": "/kubepods-pod1",
			"resources":     env.Object{"cpu_period": 100000, "cpu_quota": 100000, "memory_limit_in_bytes": limit << 20},
			"overhead":      env.Object{"cpu_period": 100000, "cpu_quota": 25000, "memory_limit_in_bytes": overhead << 20},
		}})
		id := p.run("one", "sleep 1000")
		// KVM leaves 358 MiB of it, TCG 286; the guest's kernel keeps up to 50.
		if got := p.memory(id); got < limit+286-50 || got > limit+358 {
			t.Errorf("memory = %d MiB; want the limit and most of the overhead", got)
		}
		if got := p.sh(id, "nproc"); got != "1" {
			t.Errorf("nproc = %s; want 1: the overhead is not the containers'", got)
		}
		if log := e.Log(); strings.Contains(log, "overhead of") {
			t.Errorf("the log warns of an overhead that is enough:\n%s", log)
		}
		// Where the whole pod does not fit, the log says so.
		makeCgroup(t, e, "/kubepods-pod2", (limit+10)<<20)
		runPod(t, e, "meagre", env.Object{"linux": env.Object{
			"cgroup_parent": "/kubepods-pod2",
			"resources":     env.Object{"memory_limit_in_bytes": limit << 20},
			"overhead":      env.Object{"memory_limit_in_bytes": 10 << 20},
		}})
		if log := e.Log(); !strings.Contains(log, "overhead of 10 MiB is too small") || !strings.Contains(log, "default/meagre") {
			t.Errorf("the log does not warn of an overhead that is too small:\n%s", e.LogTail(20))
		}
	})
}

// memory is what a container sees, in MiB.
func (p *pod) memory(id string) (mib int) {
	p.t.Helper()
	if _, err := fmt.Sscanf(p.sh(id, "grep MemTotal /proc/meminfo"), "MemTotal: %d kB", &mib); err != nil {
		p.t.Error(err)
	}
	return mib >> 10
}

// makeCgroup makes a cgroup with a memory limit, until the end of the test.
func makeCgroup(t *testing.T, e *env.Env, path string, limit int) {
	t.Helper()
	script := func(ctx context.Context, lines string) {
		t.Helper()
		if _, err := e.Command(ctx, "sh", "-ec", "cd /sys/fs/cgroup\n"+lines, "sh", path, fmt.Sprint(limit)).Run(); err != nil {
			t.Error(err)
		}
	}
	script(env.Context(t), `if [ -e memory ]; then mkdir memory$1; echo $2 >memory$1/memory.limit_in_bytes
	else mkdir ./$1; echo $2 >./$1/memory.max; fi`)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		script(ctx, `for d in ./$1 */$1; do if [ -e $d ]; then rmdir $d; fi; done`)
	})
}
