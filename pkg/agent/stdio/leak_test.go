package stdio

import (
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// checkLeaks fails the test if it ends with more descriptors or goroutines of
// this package, or of containerd's FIFOs, than it began with.
func checkLeaks(t *testing.T) {
	t.Helper()
	fds, routines := openFDs(t), ourGoroutines()
	t.Cleanup(func() {
		deadline := time.Now().Add(patience)
		for {
			nowFDs, now := openFDs(t), ourGoroutines()
			if len(nowFDs) <= len(fds) && len(now) <= len(routines) {
				return
			}
			if time.Now().After(deadline) {
				t.Errorf("descriptors = %v; want no more than %v", nowFDs, fds)
				t.Errorf("goroutines = %d; want %d:\n%s", len(now), len(routines), strings.Join(now, "\n\n"))
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
}

func openFDs(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var open []string
	for _, e := range entries {
		// The folder itself is open, too, but gone by now.
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			open = append(open, target)
		}
	}
	return open
}

func ourGoroutines() []string {
	buf := make([]byte, 1<<20)
	buf = buf[:runtime.Stack(buf, true)]
	var ours []string
	for _, g := range strings.Split(string(buf), "\n\n") {
		if (strings.Contains(g, "pkg/agent/stdio.") || strings.Contains(g, "containerd/fifo.")) && !strings.Contains(g, "testing.tRunner") {
			ours = append(ours, g)
		}
	}
	return ours
}
