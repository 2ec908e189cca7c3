package clock

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Follow's policy: a small offset is slewed, so that time never repeats; a
// large one, such as after the machine was paused, is stepped.
const (
	followInterval = 5 * time.Second
	followSlew     = 200 * time.Microsecond
	followStep     = 10 * time.Millisecond
)

// HostClock is the host's real-time clock as KVM's paravirtual PTP device
// shows it (drivers/ptp/ptp_kvm_common.c).
type HostClock struct{ f *os.File }

// OpenHostClock returns the host's clock, or an error that wraps
// os.ErrNotExist when the machine has none.
func OpenHostClock() (*HostClock, error) {
	names, err := filepath.Glob("/sys/class/ptp/*/clock_name")
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		// Other PTP devices show the clock of a network card.
		if b, err := os.ReadFile(name); err != nil || !strings.Contains(strings.ToLower(string(b)), "kvm") {
			continue
		}
		f, err := os.Open(filepath.Join("/dev", filepath.Base(filepath.Dir(name))))
		if err != nil {
			return nil, err
		}
		return &HostClock{f}, nil
	}
	return nil, fmt.Errorf("PTP clock of KVM: %w", os.ErrNotExist)
}

// Offset returns how far the guest's clock is behind the host's. Both are
// read at the same instant (PTP_SYS_OFFSET_PRECISE).
func (c *HostClock) Offset() (time.Duration, error) {
	o, err := unix.IoctlPtpSysOffsetPrecise(int(c.f.Fd()))
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", c.f.Name(), err)
	}
	return ptpTime(o.Device).Sub(ptpTime(o.Realtime)), nil
}

func ptpTime(t unix.PtpClockTime) time.Time { return time.Unix(t.Sec, int64(t.Nsec)) }

// Close closes the clock.
func (c *HostClock) Close() error { return c.f.Close() }

// Follow keeps the guest's clock at c until ctx ends or c cannot be read.
func Follow(ctx context.Context, c *HostClock) error {
	tick := time.NewTicker(followInterval)
	defer tick.Stop()
	for {
		offset, err := c.Offset()
		if err != nil {
			return err
		}
		step, slew := correction(offset)
		if step != 0 {
			err = Step(step)
		} else if slew != 0 {
			err = Slew(slew)
		}
		if err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// correction returns by how much to step and to slew; at most one is not 0.
func correction(offset time.Duration) (step, slew time.Duration) {
	switch size := offset.Abs(); {
	case size >= followStep:
		return offset, 0
	case size >= followSlew:
		return 0, offset
	}
	return 0, 0
}
