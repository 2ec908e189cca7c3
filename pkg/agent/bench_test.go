package agent_test

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/guest"
)

// BenchmarkBoot measures from the VMM's exec to the agent's Hello, and on to its
// first answer to a request; what of it is the agent's, since the kernel has
// started it; and the VMM's processor time until Hello, which a busy machine
// distorts less.
//
// VMRT_BENCH_GUESTS names more folders of guest files, separated by colons, for
// comparison: their machines take turns with those of this tree.
func BenchmarkBoot(b *testing.B) {
	roots := []string{""}
	if more := os.Getenv("VMRT_BENCH_GUESTS"); more != "" {
		roots = append(roots, strings.Split(more, ":")...)
	}
	for _, kind := range []string{guest.Tuned, guest.Stock} {
		b.Run(kind, func(b *testing.B) {
			boots := make([]boots, len(roots))
			for b.Loop() {
				for i, root := range roots {
					boots[i].add(b, bootVM(b, vmSpec{root: root, kind: kind, cmdline: []string{"vmrt.debug"}, asBuilt: true}))
				}
			}
			b.ReportMetric(0, "ns/op")
			for i, root := range roots {
				boots[i].report(b, root)
			}
		})
	}
}

// boots are what was measured of several boots.
type boots struct{ ready, cpu, answered, own []time.Duration }

func (m *boots) add(b *testing.B, v *virtual) {
	m.ready = append(m.ready, v.ready)
	m.cpu = append(m.cpu, v.cpu)
	if _, err := connect(b, v).agent.Clock(testContext(b), &api.ClockRequest{}); err != nil {
		b.Fatal(err)
	}
	m.answered = append(m.answered, time.Since(v.begin))
	phases := awaitPhases(b, v)
	b.Log(v.ready, phases)
	var start, hello float64
	for _, f := range strings.Fields(phases) {
		fmt.Sscanf(f, "start=%f", &start)
		fmt.Sscanf(f, "hello=%f", &hello)
	}
	m.own = append(m.own, time.Duration((hello-start)*float64(time.Millisecond)))
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := v.vm.Kill(ctx); err != nil {
		b.Error(err)
	}
}

func (m *boots) report(b *testing.B, root string) {
	if root != "" {
		root = "-of-" + root
	}
	for name, d := range map[string][]time.Duration{
		"ready": m.ready, "cpu": m.cpu, "answered": m.answered, "agent": m.own,
	} {
		b.ReportMetric(median(d).Seconds()*1000, name+"-ms"+root)
		b.ReportMetric(slices.Min(d).Seconds()*1000, name+"-min-ms"+root)
	}
}

func median[T cmp.Ordered](d []T) T {
	d = slices.Sorted(slices.Values(d))
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

// BenchmarkFootprint reports what the agent itself costs a machine: after a
// container has started, and after many execs. Its program is in memory in any
// case, as a file of the initramfs; the anonymous part comes on top.
func BenchmarkFootprint(b *testing.B) {
	v := bootVM(b, vmSpec{kind: guest.Tuned})
	ctr := connect(b, v).running(b, func(s *specs.Spec) { s.Linux.Namespaces = s.Linux.Namespaces[1:] })
	for b.Loop() {
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(agentKiB(b, ctr, "Rss"), "KiB-rss")
	b.ReportMetric(agentKiB(b, ctr, "Anonymous"), "KiB-anonymous")
	for range 20 {
		ctr.output("true")
	}
	b.ReportMetric(agentKiB(b, ctr, "Anonymous"), "KiB-anonymous-after-20-execs")
}

// agentKiB returns one line of the agent's memory map.
func agentKiB(t testing.TB, ctr *container, field string) (kib float64) {
	t.Helper()
	out, _ := ctr.output("grep", "^"+field+":", "/proc/1/smaps_rollup")
	if _, err := fmt.Sscanf(out, field+": %f kB", &kib); err != nil {
		t.Fatalf("%s in smaps_rollup = %q: %v", field, out, err)
	}
	return kib
}
