package sandbox

import (
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	"github.com/vmrt/vmrt/pkg/config"
	"github.com/vmrt/vmrt/pkg/state"
)

// The end of a sandbox is the end of its containers, whose exits are saved:
// neither gets into the other's way, and nothing is left.
func TestStopWhileSaving(t *testing.T) {
	dir := t.TempDir()
	for i := range 200 {
		id := fmt.Sprintf("s%d", i)
		s := &Sandbox{
			cfg:   Config{ID: id, Namespace: "test", Settings: &config.Config{StateDir: dir}},
			store: state.Open(dir), dead: make(chan struct{}),
		}
		if _, err := s.store.Create("test", id); err != nil {
			t.Fatal(err)
		}
		var saving sync.WaitGroup
		for range 3 {
			saving.Go(func() {
				for range 10 {
					if err := s.Save(map[string]state.Container{"c": {Bundle: dir}}); err != nil {
						t.Errorf("Save() = %v; want nil", err)
					}
				}
			})
		}
		if err := s.Stop(t.Context()); err != nil {
			t.Errorf("Stop() = %v; want nil", err)
		}
		saving.Wait()
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*", "*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
