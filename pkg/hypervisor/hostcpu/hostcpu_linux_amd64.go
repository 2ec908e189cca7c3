package hostcpu

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// window is the time between the two readings of a measurement. A reading is
// good to some 100 ns, so this gives the frequency to some 20 ppm; the guest's
// clock is corrected by other means.
const window = 10 * time.Millisecond

// TSCKHz measures the counter's frequency against the kernel's unadjusted clock,
// which takes about 10 ms. The error matches errors.ErrUnsupported if the
// counter does not run at one rate always.
func TSCKHz() (uint64, error) {
	if !invariant() {
		return 0, fmt.Errorf("measure time stamp counter: the CPU's counter is not invariant: %w", errors.ErrUnsupported)
	}
	t0, c0, err := read()
	if err != nil {
		return 0, err
	}
	time.Sleep(window)
	t1, c1, err := read()
	if err != nil {
		return 0, err
	}
	if t1 <= t0 || c1 <= c0 {
		return 0, errors.New("measure time stamp counter: the counter or the clock went backwards")
	}
	return (c1 - c0) * uint64(time.Millisecond) / uint64(t1-t0), nil
}

// invariant reports CPUID 80000007H:EDX[8], "Invariant TSC" (Intel SDM volume
// 3, 18.17.1; AMD APM volume 3, appendix E).
func invariant() bool {
	const advancedPower = 0x80000007
	if highest, _, _, _ := cpuid(0x80000000, 0); highest < advancedPower {
		return false
	}
	_, _, _, edx := cpuid(advancedPower, 0)
	return edx&(1<<8) != 0
}

// read returns the clock in nanoseconds and the counter at the same moment: of
// several attempts the one that was least disturbed.
func read() (ns int64, count uint64, err error) {
	best := int64(1<<63 - 1)
	for range 8 {
		before, err := clock()
		if err != nil {
			return 0, 0, err
		}
		c := rdtsc()
		after, err := clock()
		if err != nil {
			return 0, 0, err
		}
		if after-before < best {
			best = after - before
			ns, count = before+(after-before)/2, c
		}
	}
	return ns, count, nil
}

// clock reads CLOCK_MONOTONIC_RAW, which time synchronisation does not slew.
func clock() (int64, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &ts); err != nil {
		return 0, os.NewSyscallError("clock_gettime", err)
	}
	return ts.Nano(), nil
}

// Model names this machine's processor: vendor, signature and feature words.
// It tells two machines apart, and a virtual machine before and after a move to
// another host.
func Model() (string, error) {
	_, b, c, d := cpuid(0, 0)
	signature, _, ecx, edx := cpuid(1, 0)
	_, _, extended, _ := cpuid(0x80000001, 0)
	return fmt.Sprintf("%08x%08x%08x-%08x-%08x-%08x-%08x", b, d, c, signature, ecx, edx, extended), nil
}

// cpuid executes CPUID.
func cpuid(leaf, subleaf uint32) (eax, ebx, ecx, edx uint32)

// rdtsc reads the counter after all instructions before it have completed.
func rdtsc() uint64
