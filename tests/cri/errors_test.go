package cri

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
)

// TestPodErrors is bad input to CRI, of which nothing may be left. The
// conformance suite has it without containerd, whose own part takes time on a
// busy machine.
func TestPodErrors(t *testing.T) {
	inModes(t, func(t *testing.T, e *env.Env) {
		ctx := env.Context(t)
		refused := func(name string, config env.Object, kind, want string) {
			t.Helper()
			begin := time.Now()
			p, err := e.RunPod(ctx, name, config)
			took := time.Since(begin)
			if err == nil {
				t.Errorf("pod %s = nil; want an error", name)
				if err := p.Remove(ctx); err != nil {
					t.Error(err)
				}
				return
			}
			if !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), kind) {
				t.Errorf("pod %s = %v; want %s with %q in it", name, err, kind, want)
			}
			if took > 10*time.Second {
				t.Errorf("pod %s was refused after %v", name, took)
			}
			if left, err := filepath.Glob(e.Path("/run/vmrt/k8s.io/*")); err != nil || len(left) > 0 {
				t.Errorf("pod %s has left %v, %v", name, left, err)
			}
		}
		refused("negative", env.Object{"linux": env.Object{"resources": env.Object{"memory_limit_in_bytes": -5}}}, "InvalidArgument", "memory limit of -5 bytes")
		refused("sysctl", env.Object{"linux": env.Object{"sysctls": env.Object{"net.no.such": "1"}}}, "InvalidArgument", "net.no.such")
		refused("sysctl-value", env.Object{"linux": env.Object{"sysctls": env.Object{"kernel.shmmax": "many"}}}, "InvalidArgument", "kernel.shmmax")

		// What users write of their own is nobody's business.
		p := runPod(t, e, "annotated", env.Object{"annotations": env.Object{
			"io.kubernetes.cri.sandbox-memory": "lots", "io.kubernetes.cri.container-type": "container", "example.org/pod": "\x01\n{",
		}})
		id := p.run("one", "sleep 1000")
		if got := p.sh(id, "echo alive"); got != "alive" {
			t.Errorf("container of a pod with odd annotations says %q; want alive", got)
		}
		if _, err := e.RunPod(ctx, "annotated", nil); err == nil || !strings.Contains(err.Error(), "reserved") {
			t.Errorf("second pod of a name = %v; want that the name is taken", err)
		}
		for range 2 {
			p.crictl("stopp", p.ID)
		}
		begin := time.Now()
		if _, err := p.Create(ctx, "late", image.BusyboxName, nil); err == nil || !strings.Contains(err.Error(), "not ready") && !strings.Contains(err.Error(), "not running") {
			t.Errorf("container in a pod that was stopped = %v; want an error", err)
		}
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("container in a pod that was stopped was refused after %v", took)
		}

		t.Run("no-address", func(t *testing.T) {
			setCNI(t, e, env.Object{"type": "bridge", "bridge": "test5", "ipam": env.Object{}})
			refused("no-address", nil, "", "failed to find network info for sandbox")
		})
		if left, err := os.ReadDir(e.Path("/run/netns")); err == nil && len(left) > 1 {
			t.Errorf("%d network namespaces; want that of the stopped pod at most", len(left))
		}
	})
}
