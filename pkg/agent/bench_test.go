package agent_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmrt/vmrt/guest"
)

// BenchmarkBoot measures from the VMM's exec to the agent's Hello, and what of
// it is the agent's: since the kernel has started it.
func BenchmarkBoot(b *testing.B) {
	for _, kind := range []string{guest.Tuned, guest.Stock} {
		b.Run(kind, func(b *testing.B) {
			var ready, own []time.Duration
			for b.Loop() {
				v := bootVM(b, vmSpec{kind: kind, cmdline: []string{"vmrt.debug"}})
				ready = append(ready, v.ready)
				phases := awaitPhases(b, v)
				b.Log(v.ready, phases, strings.ReplaceAll(v.console.text(), "\n", " "))
				var start, hello float64
				for _, f := range strings.Fields(phases) {
					fmt.Sscanf(f, "start=%f", &start)
					fmt.Sscanf(f, "hello=%f", &hello)
				}
				own = append(own, time.Duration((hello-start)*float64(time.Millisecond)))
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(median(ready).Seconds()*1000, "ready-ms")
			b.ReportMetric(median(own).Seconds()*1000, "agent-ms")
		})
	}
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// awaitPhases returns the agent's line of boot phases.
func awaitPhases(t testing.TB, v *virtual) string {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		for _, line := range strings.Split(v.console.text(), "\n") {
			if strings.Contains(line, "boot phases") {
				return line
			}
		}
	}
	t.Fatalf("no boot phases on the console:\n%s", v.console.text())
	return ""
}
