// Package clock corrects the guest's real-time clock.
//
// A step is visible to processes, and one backwards makes time repeat; a slew
// is not, but makes up only 0.5 ms a second. Both are atomic in the kernel
// (adjtimex(2)), so a correction never loses the time between reading the
// clock and setting it.
//
// All functions may be called from any goroutine. They need CAP_SYS_TIME.
package clock

import (
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// MaxSlew is the largest offset that Slew accepts: at 0.5 ms a second it
// takes more than half an hour.
const MaxSlew = time.Second

// Set sets the clock.
func Set(t time.Time) error {
	ts, err := unix.TimeToTimespec(t)
	if err != nil {
		return fmt.Errorf("set clock to %v: %w", t, err)
	}
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("set clock to %v: %w", t, err)
	}
	return nil
}

// Step adds d to the clock at once.
func Step(d time.Duration) error {
	if d == 0 {
		return nil
	}
	tx := stepRequest(d)
	if _, err := unix.Adjtimex(&tx); err != nil {
		return fmt.Errorf("step clock by %v: %w", d, err)
	}
	return nil
}

// stepRequest encodes d for ADJ_SETOFFSET, whose fraction is never negative.
// With ADJ_NANO the field tv_usec holds nanoseconds.
func stepRequest(d time.Duration) unix.Timex {
	sec, nsec := d/time.Second, d%time.Second
	if nsec < 0 {
		sec, nsec = sec-1, nsec+time.Second
	}
	return unix.Timex{
		Modes: unix.ADJ_SETOFFSET | unix.ADJ_NANO,
		Time:  unix.Timeval{Sec: int64(sec), Usec: int64(nsec)},
	}
}

// Slew makes up for d gradually. It replaces what is left of an earlier Slew.
func Slew(d time.Duration) error {
	if d < -MaxSlew || d > MaxSlew {
		return fmt.Errorf("slew clock by %v: at most %v: %w", d, MaxSlew, errdefs.ErrInvalidArgument)
	}
	// adjtime(3): the kernel takes microseconds here.
	tx := unix.Timex{Modes: unix.ADJ_OFFSET_SINGLESHOT, Offset: int64(d / time.Microsecond)}
	if _, err := unix.Adjtimex(&tx); err != nil {
		return fmt.Errorf("slew clock by %v: %w", d, err)
	}
	return nil
}
