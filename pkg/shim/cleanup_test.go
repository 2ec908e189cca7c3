package shim

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/pkg/state"
)

// A clean-up that fails is tried again for what is left, and not for what was
// done.
func TestCleanupAgain(t *testing.T) {
	dir := t.TempDir()
	store := state.Open(filepath.Join(dir, "state"))
	marker := filepath.Join(dir, "hooks")
	st := &state.Sandbox{
		ID: "c", Namespace: "test", CgroupPath: "no such cgroup",
		Containers: map[string]state.Container{"c": {
			Bundle: dir, OCIVersion: specs.Version,
			Poststop: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "echo poststop >> " + marker}}},
		}},
	}
	if _, err := store.Create(st.Namespace, st.ID); err != nil {
		t.Fatal(err)
	}
	if err := store.Save(st); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		err := cleanup(t.Context(), store, st, "c")
		if err == nil || !strings.Contains(err.Error(), "no such cgroup") {
			t.Fatalf("cleanup() = %v; want an error of the cgroup", err)
		}
	}
	// What was in the way has gone.
	left, err := store.Load(st.Namespace, st.ID)
	if err != nil {
		t.Fatal(err)
	}
	left.CgroupPath = ""
	if err := store.Save(left); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := cleanup(t.Context(), store, st, "c"); err != nil {
			t.Errorf("cleanup() = %v; want nil", err)
		}
	}
	if b, err := os.ReadFile(marker); string(b) != "poststop\n" {
		t.Errorf("hooks left %q, %v; want one run", b, err)
	}
	if _, err := store.Load(st.Namespace, st.ID); !errdefs.IsNotFound(err) {
		t.Errorf("state afterwards: %v; want none", err)
	}
}
