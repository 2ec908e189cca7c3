package containerd

import (
	"strings"
	"testing"

	"github.com/vmrt/vmrt/tests/env"
)

// TestClientGivesUp is a `ctr run` that is killed while its container is being
// created, as by somebody who does not want to wait: whatever containerd has
// of it can be removed, and nothing is left.
func TestClientGivesUp(t *testing.T) {
	e := start(t, "2.4")
	ctx := env.Context(t)
	// In seconds; on an idle machine the container runs after two to three.
	for _, after := range []string{"0.2", "0.5", "0.9", "1.3", "1.8", "2.5"} {
		t.Run(after, func(t *testing.T) {
			_, err := e.Command(ctx, "timeout", "-s", "KILL", after, "ctr", "run", "--rm", "--runtime", runtimeName, busybox, "box", "sleep", "1000").Run()
			if err == nil {
				t.Fatal("ctr run = nil; want it killed")
			}
			if out, err := e.Ctr(ctx, "task", "ls", "-q").Run(); err != nil {
				t.Error(err)
			} else if strings.TrimSpace(out) != "" {
				if _, err := e.Ctr(ctx, "task", "delete", "--force", "box").Run(); err != nil && !strings.Contains(err.Error(), "not found") {
					t.Error(err)
				}
			}
			if out, err := e.Ctr(ctx, "container", "ls", "-q").Run(); err != nil {
				t.Error(err)
			} else if strings.TrimSpace(out) != "" {
				if _, err := e.Ctr(ctx, "container", "delete", "box").Run(); err != nil {
					t.Error(err)
				}
			}
			removeFIFOs(t, e)
			left, err := e.Leftovers(ctx)
			if err != nil || len(left) > 0 {
				t.Errorf("left behind: %q, %v", left, err)
			}
		})
	}
}
