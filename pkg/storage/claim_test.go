//go:build linux

package storage

import (
	"errors"
	"testing"
)

func TestSharedMemory(t *testing.T) {
	source := t.TempDir()
	memory := BindOptions{Recursive: true, Memory: true}
	first, second := newPod(t), newPod(t)
	first.bind("a", source, memory)
	first.bind("b", source, memory) // of the same pod
	before := len(second.list())
	if _, err := second.AddBind("c", source, memory); !errors.Is(err, ErrMemoryInUse) {
		t.Errorf("AddBind of another pod's shared memory = %v; want ErrMemoryInUse", err)
	}
	// The folders of the container stay until RemoveContainer.
	if err := second.RemoveContainer("c"); err != nil {
		t.Fatal(err)
	}
	if got := second.list(); len(got) != before {
		t.Errorf("the refused bind left %v", got)
	}
	second.bind("d", source, BindOptions{Recursive: true}) // as files
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second.bind("e", source, memory)
}
