package accel_test

import (
	"testing"

	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/hypervisor/accel"
	"github.com/vmrt/vmrt/tests/platform"
)

// TestKVM: the probe finds a real KVM usable, and auto then takes it.
func TestKVM(t *testing.T) {
	if !platform.Lab() {
		t.Skip("needs a real KVM; make test-kvm")
	}
	cfg := accel.Config{CacheDir: t.TempDir()}
	if _, err := platform.Accelerator(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	r, err := accel.Choose(t.Context(), hypervisor.Auto, cfg)
	if err != nil || r.Accelerator != hypervisor.KVM || !r.FromCache || r.NanosPerInstruction <= 0 {
		t.Errorf("Choose(auto) = %+v, %v; want KVM by the measurement made before", r, err)
	}
	t.Log(r.Reason)
}
