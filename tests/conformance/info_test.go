package conformance

import (
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"google.golang.org/protobuf/proto"

	"github.com/vmrt/vmrt/pkg/storage"
)

// `-info` says what works, and nothing that does not: kubelet decides by it.
func TestInfo(t *testing.T) {
	requireVM(t)
	out, err := exec.Command(filepath.Join(shimDir(t), "containerd-shim-vmrt-v2"), "-info").Output()
	if err != nil {
		t.Fatal(err)
	}
	var info types.RuntimeInfo
	if err := proto.Unmarshal(out, &info); err != nil {
		t.Fatal(err)
	}
	if info.Name != "io.containerd.vmrt.v2" {
		t.Errorf("name = %q; want io.containerd.vmrt.v2", info.Name)
	}
	var f features.Features
	if err := typeurl.UnmarshalTo(info.Features, &f); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(f.MountOptions, "rro") {
		t.Error("features do not name rro, which works")
	}
	if !slices.Contains(f.Linux.Namespaces, "user") {
		t.Error("features do not name user namespaces, which work")
	}
	if m := f.Linux.MountExtensions; m == nil || m.IDMap == nil || *m.IDMap.Enabled != storage.MapsIDs() {
		t.Errorf("features say of mounts %+v; want that they can be id-mapped if this kernel can: %v", m, storage.MapsIDs())
	}
	if f.Linux.Cgroup == nil || !*f.Linux.Cgroup.V2 || *f.Linux.Cgroup.V1 {
		t.Error("features do not say that the guest has cgroup v2 alone")
	}
}
