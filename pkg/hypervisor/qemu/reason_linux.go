package qemu

import (
	"encoding/json"

	"github.com/vmrt/vmrt/pkg/hypervisor/qemu/qmp"
)

// reasons are the guest's own ways to end its machine, in QEMU's words
// (ShutdownCause in qapi/run-state.json).
var reasons = map[string]string{
	"guest-shutdown": "it powered off",
	"guest-reset":    "it reset",
	"guest-panic":    "it panicked",
}

// note remembers an event that says why the guest stopped.
func (v *VM) note(ev qmp.Event) {
	var data struct{ Reason string }
	// Data of another form has no reason in it.
	_ = json.Unmarshal(ev.Data, &data)
	reason := reasons[data.Reason]
	if ev.Name == "GUEST_PANICKED" {
		reason = reasons["guest-panic"]
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.reason == "" {
		v.reason = reason
	}
}
