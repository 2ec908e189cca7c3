package agent_test

import (
	"testing"
	"time"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/tests/platform"
)

// TestKVMClock: under KVM the agent follows the host's clock by itself. Nobody
// else corrects it here.
func TestKVMClock(t *testing.T) {
	if !platform.Lab() {
		t.Skip("needs a real KVM; make test-kvm")
	}
	const (
		limit  = 50 * time.Millisecond
		within = time.Minute
	)
	c := connect(t, bootVM(t, vmSpec{kind: guest.Tuned, asBuilt: true}))
	for _, step := range []time.Duration{time.Hour, -time.Second} {
		if _, err := c.agent.Clock(testContext(t), &api.ClockRequest{StepNs: int64(step)}); err != nil {
			t.Fatalf("Clock(step %v) = %v", step, err)
		}
		start := time.Now()
		for {
			off, uncertainty := c.best(t)
			if off.Abs() < limit/2 && uncertainty < limit/2 {
				t.Logf("a clock stepped by %v is off by %v ±%v after %v", step, off, uncertainty, time.Since(start))
				break
			}
			if time.Since(start) > within {
				t.Fatalf("a clock stepped by %v is off by %v ±%v after %v; want less than %v", step, off, uncertainty, within, limit)
			}
			time.Sleep(100 * time.Millisecond) // the guest has no event to wait for
		}
	}
}
