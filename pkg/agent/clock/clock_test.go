package clock

import (
	"errors"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestStepRequest(t *testing.T) {
	for _, tt := range []struct {
		d         time.Duration
		sec, nsec int64
	}{
		{time.Second, 1, 0},
		{1500 * time.Millisecond, 1, 500000000},
		{-1, -1, 999999999},
		{-1500 * time.Millisecond, -2, 500000000},
		{-time.Second, -1, 0},
	} {
		got := stepRequest(tt.d)
		if got.Time.Sec != tt.sec || got.Time.Usec != tt.nsec || got.Modes != unix.ADJ_SETOFFSET|unix.ADJ_NANO {
			t.Errorf("stepRequest(%v) = %d s %d ns, modes %#x; want %d s %d ns", tt.d, got.Time.Sec, got.Time.Usec, got.Modes, tt.sec, tt.nsec)
		}
	}
}

func TestSlewIsBounded(t *testing.T) {
	for _, d := range []time.Duration{MaxSlew + 1, -MaxSlew - 1} {
		if err := Slew(d); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("Slew(%v) = %v; want %v", d, err, errdefs.ErrInvalidArgument)
		}
	}
}

func TestCorrection(t *testing.T) {
	for _, tt := range []struct{ offset, step, slew time.Duration }{
		{0, 0, 0},
		{100 * time.Microsecond, 0, 0},
		{time.Millisecond, 0, time.Millisecond},
		{-time.Millisecond, 0, -time.Millisecond},
		{50 * time.Millisecond, 50 * time.Millisecond, 0},
		{-time.Hour, -time.Hour, 0},
	} {
		if step, slew := correction(tt.offset); step != tt.step || slew != tt.slew {
			t.Errorf("correction(%v) = %v, %v; want %v, %v", tt.offset, step, slew, tt.step, tt.slew)
		}
	}
}
