package env_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
)

// A pod of runc, its image from the registry, its network from CNI.
func TestPod(t *testing.T) {
	ctx := env.Context(t)
	e := env.ForTest(t, env.Config{CRI: &env.CRI{Images: []image.Image{busybox(t)}}})
	pod, err := e.RunPod(ctx, "pod", env.Object{"hostname": "box"})
	if err != nil {
		t.Fatal(err)
	}
	id, err := pod.Run(ctx, "one", image.BusyboxName, env.Object{"command": []string{"sh", "-c", "hostname; exec sleep 1000"}})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := e.Crictl(ctx, "exec", "-s", id, "cat", "/sys/class/net/eth0/operstate").Run(); err != nil || strings.TrimSpace(out) != "up" {
		t.Errorf("state of eth0 = %q, %v; want up", out, err)
	}
	if _, err := e.Crictl(ctx, "stop", "--timeout", "0", id).Run(); err != nil {
		t.Error(err)
	}
	log, err := os.ReadFile(filepath.Join(pod.LogDir, "one.log"))
	if err != nil || !strings.HasSuffix(string(log), " stdout F box\n") {
		t.Errorf("log = %q, %v; want the hostname", log, err)
	}
	if err := pod.Remove(ctx); err != nil {
		t.Error(err)
	}
}

func TestBadCRI(t *testing.T) {
	env.NeedRoot(t)
	for _, cri := range []env.CRI{{Runtime: "crun"}, {Sandboxer: "none"}, {Runtime: "runc", Sandboxer: "shim"}, {Streaming: true}} {
		if e, err := env.Start(t.Context(), env.Config{CRI: &cri}); err == nil {
			t.Errorf("Start(%+v) = nil error; want one", cri)
			if err := e.Stop(); err != nil {
				t.Error(err)
			}
		}
	}
}
