package cri

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/vmrt/vmrt/tests/env"
)

// TestClientGivesUp is a RunPodSandbox whose client goes away meanwhile: what
// has come to be can be removed, and nothing else is left.
func TestClientGivesUp(t *testing.T) {
	inModes(t, func(t *testing.T, e *env.Env) {
		ctx := env.Context(t)
		// In seconds; on an idle machine a pod is ready after two to three.
		for _, after := range []string{"0.2", "0.6", "1.2", "2"} {
			t.Run(after, func(t *testing.T) {
				logs := filepath.Join(e.Dir, "pods", "hasty")
				if err := os.MkdirAll(logs, 0o755); err != nil {
					t.Fatal(err)
				}
				config, err := json.Marshal(env.Object{
					"metadata":      env.Object{"name": "hasty", "namespace": "default", "uid": after, "attempt": 1},
					"log_directory": logs, "linux": env.Object{},
				})
				if err != nil {
					t.Fatal(err)
				}
				file := filepath.Join(logs, "pod.json")
				if err := os.WriteFile(file, config, 0o644); err != nil {
					t.Fatal(err)
				}
				if _, err := e.Command(ctx, "timeout", "-s", "KILL", after, "crictl", "runp", file).Run(); err == nil {
					t.Log("the pod was ready before")
				}
				removeAll(t, e)
				left, err := e.Leftovers(ctx)
				if err != nil || len(left) > 0 {
					t.Errorf("left behind: %q, %v", left, err)
				}
			})
		}
	})
}
