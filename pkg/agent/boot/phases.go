package boot

import (
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"
)

// Phases records when the steps of a boot were done.
type Phases struct {
	names []string
	at    []time.Duration
}

// Mark notes that the step name is done.
func (p *Phases) Mark(name string) {
	p.names = append(p.names, name)
	p.at = append(p.at, sinceBoot())
}

// WriteTo writes one line: each step with the milliseconds since the kernel
// started.
func (p *Phases) WriteTo(w io.Writer) (int64, error) {
	line := "vm-agent: boot phases [ms since kernel start]:"
	for i, name := range p.names {
		line += fmt.Sprintf(" %s=%.1f", name, float64(p.at[i])/float64(time.Millisecond))
	}
	n, err := io.WriteString(w, line+"\n")
	return int64(n), err
}

func sinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}
