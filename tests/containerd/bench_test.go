package containerd

import (
	"context"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmrt/vmrt/tests/env"
)

// BenchmarkRun prints how long `ctr run --rm` of a static program that says
// hello takes with vmrt and, in turns, with runc: medians in milliseconds.
//
// For vmrt it prints where the time goes. "client" is all before the shim's
// process (ctr, containerd, the shim's start command), "host" what Create does
// on the host beside the boot. "output" is from the end of Create to the first
// byte that ctr printed, which comes before or after the end of "start".
// What the phases leave of the total is ctr and containerd between requests.
func BenchmarkRun(b *testing.B) {
	e := start(b, "2.4", "runc")
	ctx := env.Context(b)
	for _, runtime := range []string{runcName, runtimeName} { // fills caches
		if _, err := run(ctx, e, runtime); err != nil {
			b.Fatal(err)
		}
	}
	all := map[string][]time.Duration{}
	note := func(phases map[string]time.Duration) {
		for name, d := range phases {
			all[name] = append(all[name], d)
		}
	}
	for b.Loop() {
		runc, err := run(ctx, e, runcName)
		if err != nil {
			b.Fatal(err)
		}
		before := len(e.Log())
		vmrt, err := run(ctx, e, runtimeName)
		if err != nil {
			b.Fatal(err)
		}
		phases, err := phasesOf(vmrt, e.Log()[before:])
		if err != nil {
			b.Fatal(err)
		}
		note(phases)
		note(map[string]time.Duration{
			"runc": runc.end.Sub(runc.begin), "runc-output": runc.output.Sub(runc.begin),
			"vmrt": vmrt.end.Sub(vmrt.begin), "vmrt-output": vmrt.output.Sub(vmrt.begin),
		})
	}
	medians := map[string]time.Duration{}
	for name, d := range all {
		slices.Sort(d)
		medians[name] = d[len(d)/2]
		b.ReportMetric(float64(medians[name].Microseconds())/1000, strings.ReplaceAll(name, " ", "-")+"-ms")
	}
	b.ReportMetric(medians["vmrt"].Seconds()/medians["runc"].Seconds(), "vmrt/runc")
	b.ReportMetric(0, "ns/op")
	table(b, len(all["vmrt"]), medians)
}

// table writes the medians in the order in which things happen.
func table(b *testing.B, n int, medians map[string]time.Duration) {
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		b.Fatal(err)
	}
	var s strings.Builder
	fmt.Fprintf(&s, "medians of %d runs; load average %.14s\n", n, load)
	fmt.Fprintf(&s, "%-22s%8s%14s\n", "", "total", "first output")
	for _, name := range []string{"runc", "vmrt"} {
		fmt.Fprintf(&s, "%-22s%5d ms%11d ms\n", name, medians[name].Milliseconds(), medians[name+"-output"].Milliseconds())
	}
	fmt.Fprintf(&s, "%-22s%8.1f%14.1f\n", "ratio", medians["vmrt"].Seconds()/medians["runc"].Seconds(),
		medians["vmrt-output"].Seconds()/medians["runc-output"].Seconds())
	var sum time.Duration
	for _, name := range phaseNames {
		fmt.Fprintf(&s, "%-22s%5d ms\n", "  "+name, medians[name].Milliseconds())
		if name != "host" && name != "output" { // beside others
			sum += medians[name]
		}
	}
	fmt.Fprintf(&s, "%-22s%5d ms", "  (between requests)", (medians["vmrt"] - sum).Milliseconds())
	b.Log(s.String())
}

// once is one run of a container.
type once struct{ begin, output, end time.Time }

func run(ctx context.Context, e *env.Env, runtime string) (o once, err error) {
	cmd := e.Ctr(ctx, "run", "--rm", "--runtime", runtime, busybox, "hello", "echo", "hello")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return o, err
	}
	o.begin = time.Now()
	if err := cmd.Start(); err != nil {
		return o, err
	}
	first := make([]byte, 1)
	_, readErr := io.ReadFull(stdout, first)
	o.output = time.Now()
	rest, restErr := io.ReadAll(stdout)
	err = cmd.Wait()
	o.end = time.Now()
	if got := string(first) + string(rest); err == nil && got != "hello\n" {
		err = fmt.Errorf("ctr run printed %q (%v, %v); want hello", got, readErr, restErr)
	}
	return o, err
}

// phaseNames are the phases of a run in their order.
var phaseNames = []string{
	"client", "shim start", "prepare", "VM to hello", "connect", "host", "create in guest", "start", "output", "delete", "shutdown",
}

// phasesOf reads the phases of one run out of what the shim has logged.
func phasesOf(o once, log string) (map[string]time.Duration, error) {
	lines := map[string]line{}
	for _, msg := range []string{"virtual machine is ready", "container created", "process started", "container deleted", "sandbox stopped"} {
		l, err := find(log, msg)
		if err != nil {
			return nil, err
		}
		lines[msg] = l
	}
	ready, created := lines["virtual machine is ready"], lines["container created"]
	// The shim's process began this long after the client's.
	launched := created.at.Add(-created.d["took"] - created.d["age"])
	return map[string]time.Duration{
		"client":          launched.Sub(o.begin),
		"shim start":      created.d["age"],
		"prepare":         ready.d["prepared"],
		"VM to hello":     ready.d["booted"],
		"connect":         ready.d["connected"],
		"host":            created.d["host"],
		"create in guest": created.d["guest"],
		"start":           lines["process started"].d["took"],
		"output":          o.output.Sub(created.at),
		"delete":          lines["container deleted"].d["took"],
		"shutdown":        lines["sandbox stopped"].d["took"],
	}, nil
}

// line is a line of the log: when, and its fields that are durations.
type line struct {
	at time.Time
	d  map[string]time.Duration
}

var (
	logTime  = regexp.MustCompile(`^time="([^"]+)"`)
	logField = regexp.MustCompile(` (\w+)=([0-9.]+[µnm]?s)\b`)
)

func find(log, msg string) (l line, err error) {
	for text := range strings.Lines(log) {
		if !strings.Contains(text, `msg="`+msg+`"`) {
			continue
		}
		m := logTime.FindStringSubmatch(text)
		if m == nil {
			return l, fmt.Errorf("no time in %q", text)
		}
		if l.at, err = time.Parse(time.RFC3339Nano, m[1]); err != nil {
			return l, err
		}
		l.d = map[string]time.Duration{}
		for _, f := range logField.FindAllStringSubmatch(text, -1) {
			if l.d[f[1]], err = time.ParseDuration(f[2]); err != nil {
				return l, err
			}
		}
		return l, nil
	}
	return l, fmt.Errorf("the log has no line %q", msg)
}
