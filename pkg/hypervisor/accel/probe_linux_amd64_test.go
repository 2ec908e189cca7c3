package accel

import (
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Limits that a test with a fake may take: it waits for them only where the
// fake hangs.
const (
	testSoft = 100 * time.Millisecond
	testHard = 400 * time.Millisecond
)

func TestStructureSizes(t *testing.T) {
	// The size is in bits 16 to 29 of an ioctl's number.
	sizes := map[uint]uintptr{
		kvmSetUserMemoryRegion: unsafe.Sizeof(userMemoryRegion{}),
		kvmGetRegs:             unsafe.Sizeof(regs{}),
		kvmSetRegs:             unsafe.Sizeof(regs{}),
		kvmGetSregs:            unsafe.Sizeof(sregs{}),
		kvmSetSregs:            unsafe.Sizeof(sregs{}),
	}
	for request, got := range sizes {
		if want := uintptr(request >> 16 & (1<<14 - 1)); got != want {
			t.Errorf("structure of ioctl %#x has %d bytes; want %d", request, got, want)
		}
	}
}

func TestProbe(t *testing.T) {
	fail := func(at uint, err error) func(*fakeKernel) {
		return func(k *fakeKernel) {
			k.hook = func(_ *fakeKernel, request uint) (bool, int, error) { return request == at, 0, err }
		}
	}
	exit := func(reason uint32) func(*fakeKernel) {
		return func(k *fakeKernel) {
			k.hook = func(k *fakeKernel, request uint) (bool, int, error) {
				if request != kvmRun {
					return false, 0, nil
				}
				binary.LittleEndian.PutUint32(k.shared[runExitReason:], reason)
				return true, 0, nil
			}
		}
	}
	tests := map[string]struct {
		nanos   float64
		prepare func(*fakeKernel)
		want    float64 // nanoseconds, 0 for an error
		slices  int
		err     string
		kind    error
	}{
		"native":           {nanos: 0.4, want: 0.4, slices: 1},
		"emulated":         {nanos: 1500, want: 1500, slices: 3},
		"slow first slice": {nanos: 2, prepare: func(k *fakeKernel) { k.firstSlice = 10 * time.Millisecond }, want: 2, slices: 2},
		"at the limit":     {nanos: slow, want: slow, slices: 3},
		"just below it":    {nanos: slow - 1, want: slow - 1, slices: 1},
		"no device":        {prepare: func(k *fakeKernel) { k.openErr = unix.ENOENT }, err: "open /dev/fake: no such file or directory", kind: fs.ErrNotExist},
		"no right":         {prepare: func(k *fakeKernel) { k.openErr = unix.EACCES }, err: "open /dev/fake: permission denied", kind: fs.ErrPermission},
		"not KVM":          {prepare: fail(kvmGetAPIVersion, unix.ENOTTY), err: "/dev/fake: KVM_GET_API_VERSION: inappropriate ioctl for device"},
		"another version": {prepare: func(k *fakeKernel) {
			k.hook = func(_ *fakeKernel, r uint) (bool, int, error) { return r == kvmGetAPIVersion, 11, nil }
		}, err: "/dev/fake: KVM API version 11: want 12"},
		"no VM":     {prepare: fail(kvmCreateVM, unix.EBUSY), err: "/dev/fake: KVM_CREATE_VM: device or resource busy", kind: unix.EBUSY},
		"no TSS":    {prepare: fail(kvmSetTSSAddr, unix.EINVAL), err: "/dev/fake: KVM_SET_TSS_ADDR: invalid argument"},
		"no memory": {prepare: fail(kvmSetUserMemoryRegion, unix.ENOMEM), err: "/dev/fake: KVM_SET_USER_MEMORY_REGION: cannot allocate memory"},
		"no vCPU":   {prepare: fail(kvmCreateVCPU, unix.EIO), err: "/dev/fake: KVM_CREATE_VCPU: input/output error"},
		"no size": {prepare: func(k *fakeKernel) {
			k.hook = func(_ *fakeKernel, r uint) (bool, int, error) { return r == kvmGetVCPUMmapSize, 64, nil }
		}, err: "/dev/fake: a shared structure of 64 bytes"},
		"no registers":       {prepare: fail(kvmGetSregs, unix.EIO), err: "/dev/fake: KVM_GET_SREGS: input/output error"},
		"no long mode":       {prepare: fail(kvmSetSregs, unix.EINVAL), err: "/dev/fake: KVM_SET_SREGS: invalid argument"},
		"no other registers": {prepare: fail(kvmSetRegs, unix.EINVAL), err: "/dev/fake: KVM_SET_REGS: invalid argument"},
		"no run":             {prepare: fail(kvmRun, unix.ENOEXEC), err: "/dev/fake: KVM_RUN: exec format error"},
		"triple fault":       {prepare: exit(exitShutdown), err: "/dev/fake: the guest ended with exit 8 (triple fault)"},
		"entry refused":      {prepare: exit(exitFailEntry), err: "/dev/fake: the guest ended with exit 9 (the processor refused to enter it)"},
		"internal error":     {prepare: exit(exitInternalError), err: "/dev/fake: the guest ended with exit 17 (internal error)"},
		"wrong port":         {prepare: exit(exitIO), err: "/dev/fake: the guest ended with exit 2"},
		"wrong sum": {prepare: func(k *fakeKernel) {
			k.hook = func(k *fakeKernel, r uint) (bool, int, error) {
				if r != kvmRun {
					return false, 0, nil
				}
				err := k.run()
				k.memory[dataPage]++
				return true, 0, err
			}
		}, err: "/dev/fake: the guest's sum is 2: want 1"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			k := newFake(t, tt.nanos)
			if tt.prepare != nil {
				tt.prepare(k)
			}
			v := probeOn(context.Background(), k, "/dev/fake", 10*time.Second, 20*time.Second)
			if tt.want != 0 && (v.err != nil || !v.Measured || v.NanosPerInstruction != tt.want || k.slices != tt.slices) {
				t.Errorf("probe = %+v after %d slices; want %v ns after %d", v, k.slices, tt.want, tt.slices)
			}
			if tt.want == 0 && (v.Measured || v.err == nil || v.err.Error() != tt.err) {
				t.Errorf("probe = %+v; want %q", v, tt.err)
			}
			if tt.kind != nil && !errors.Is(v.err, tt.kind) {
				t.Errorf("probe = %v; want it to match %v", v.err, tt.kind)
			}
			if n := k.left(); n != 0 {
				t.Errorf("%d descriptors and mappings left", n)
			}
		})
	}
}

// blockAt makes whole slices wait for a signal; before is done first.
func blockAt(at uint, before func(*fakeKernel)) func(*fakeKernel, uint) (bool, int, error) {
	return func(k *fakeKernel, request uint) (bool, int, error) {
		if request != at || at == kvmRun && k.regs.r8 != rounds {
			return false, 0, nil
		}
		if before != nil {
			before(k)
		}
		return true, 0, k.block()
	}
}

// partial is a slice that has come to its thousandth instruction in 20 ms.
func partial(k *fakeKernel) {
	k.regs.rcx = rounds - 1000/perRound
	binary.LittleEndian.PutUint64(k.memory[dataPage:], 1)
	k.thread += 20 * time.Millisecond
}

// TestProbeInterrupted: a guest that does not come to its exit is asked how far
// it has come.
func TestProbeInterrupted(t *testing.T) {
	t.Run("after some instructions", func(t *testing.T) {
		k := newFake(t, 1500)
		blocked := false
		k.hook = func(k *fakeKernel, request uint) (bool, int, error) {
			if request != kvmRun || k.regs.r8 != rounds || blocked {
				return false, 0, nil
			}
			blocked = true
			partial(k)
			return true, 0, k.block()
		}
		start := time.Now()
		v := probeOn(context.Background(), k, "/dev/fake", testSoft, 10*time.Second)
		// One partial slice at 20000 ns, and one whole one at 1500: enough
		// after the soft limit.
		if !v.Measured || v.NanosPerInstruction != 1500 || k.slices != 1 {
			t.Errorf("probe = %+v after %d whole slices; want 1500 ns after 1", v, k.slices)
		}
		if d := time.Since(start); d < testSoft || d > 5*time.Second {
			t.Errorf("decided after %v; want soon after %v", d, testSoft)
		}
		if n := k.left(); n != 0 {
			t.Errorf("%d descriptors and mappings left", n)
		}
	})
	t.Run("and fast after that", func(t *testing.T) {
		k := newFake(t, 2)
		blocked := false
		k.hook = func(k *fakeKernel, request uint) (bool, int, error) {
			if request != kvmRun || blocked {
				return false, 0, nil
			}
			blocked = true // already the first round
			return true, 0, k.block()
		}
		v := probeOn(context.Background(), k, "/dev/fake", testSoft, 10*time.Second)
		if !v.Measured || v.NanosPerInstruction != 2 {
			t.Errorf("probe = %+v; want 2 ns", v)
		}
	})
	t.Run("after none", func(t *testing.T) {
		k := newFake(t, 0)
		// What rcx holds is left from the slice before.
		k.hook = blockAt(kvmRun, func(k *fakeKernel) { k.regs.rcx = 0 })
		v := probeOn(context.Background(), k, "/dev/fake", testSoft, testHard)
		if v.Measured || v.err == nil || !strings.Contains(v.err.Error(), "no answer from the kernel within 400ms to KVM_RUN") {
			t.Errorf("probe = %+v; want no answer to KVM_RUN", v)
		}
		waitReleased(t, k)
	})
	t.Run("with a broken counter", func(t *testing.T) {
		k := newFake(t, 0)
		k.hook = blockAt(kvmRun, func(k *fakeKernel) { k.regs.rcx = 1 << 60 })
		v := probeOn(context.Background(), k, "/dev/fake", testSoft, 10*time.Second)
		if v.Measured || v.err == nil || !strings.Contains(v.err.Error(), "counter") {
			t.Errorf("probe = %+v; want an error about the counter", v)
		}
	})
	t.Run("before the guest", func(t *testing.T) {
		k := newFake(t, 2)
		blocked := false
		k.hook = func(k *fakeKernel, request uint) (bool, int, error) {
			if request != kvmCreateVM || blocked {
				return false, 0, nil
			}
			blocked = true
			return true, 0, k.block()
		}
		v := probeOn(context.Background(), k, "/dev/fake", testSoft, 10*time.Second)
		if !v.Measured || v.NanosPerInstruction != 2 {
			t.Errorf("probe = %+v; want 2 ns: the system call is made again", v)
		}
		if n := k.left(); n != 0 {
			t.Errorf("%d descriptors and mappings left", n)
		}
	})
}

// TestProbeHangs: a system call that not even a signal ends is left behind, and
// cleans up when it does end.
func TestProbeHangs(t *testing.T) {
	for name, at := range map[string]uint{"KVM_CREATE_VM": kvmCreateVM, "KVM_CREATE_VCPU": kvmCreateVCPU, "KVM_RUN": kvmRun} {
		t.Run(name, func(t *testing.T) {
			k := newFake(t, 1)
			release := make(chan struct{})
			k.hook = func(_ *fakeKernel, request uint) (bool, int, error) {
				if request == at {
					<-release
				}
				return false, 0, nil
			}
			start := time.Now()
			v := probeOn(context.Background(), k, "/dev/fake", testSoft, testHard)
			if d := time.Since(start); d < testHard || d > testHard+5*time.Second {
				t.Errorf("decided after %v; want %v", d, testHard)
			}
			if want := "/dev/fake: no answer from the kernel within 400ms to " + name; v.Measured || v.err == nil || v.err.Error() != want {
				t.Errorf("probe = %+v; want %q", v, want)
			}
			close(release)
			waitReleased(t, k)
		})
	}
}

func waitReleased(t *testing.T, k *fakeKernel) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); k.left() != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d descriptors and mappings left", k.left())
		}
	}
}

func TestProbeEndsWithItsContext(t *testing.T) {
	k := newFake(t, 0)
	k.hook = blockAt(kvmRun, nil)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	v := probeOn(ctx, k, "/dev/fake", 10*time.Second, 20*time.Second)
	if !errors.Is(v.err, context.DeadlineExceeded) {
		t.Errorf("probe = %+v; want a deadline error", v)
	}
	waitReleased(t, k)
}

// TestIntegrationProbe runs the real thing, whatever it says here.
func TestIntegrationProbe(t *testing.T) {
	start := time.Now()
	v := probe(context.Background(), DefaultDevice, HardLimit)
	d := time.Since(start)
	if errors.Is(v.err, fs.ErrNotExist) || errors.Is(v.err, fs.ErrPermission) {
		t.Skipf("no KVM: %v", v.err)
	}
	t.Logf("%+v in %v: %v", v, d, v.err)
	if d > HardLimit+5*time.Second {
		t.Errorf("the probe took %v; want at most %v", d, HardLimit)
	}
	if !v.Measured && v.err == nil {
		t.Errorf("probe = %+v; want a measurement or an error", v)
	}
	if v.Measured && (v.NanosPerInstruction <= 0 || v.NanosPerInstruction > 1e6) {
		t.Errorf("probe = %+v; want a plausible speed", v)
	}
}

// TestIntegrationProbeInterrupted takes a real guest's processor away from it.
func TestIntegrationProbeInterrupted(t *testing.T) {
	v := probeOn(context.Background(), host{}, DefaultDevice, time.Millisecond, HardLimit)
	if errors.Is(v.err, fs.ErrNotExist) || errors.Is(v.err, fs.ErrPermission) {
		t.Skipf("no KVM: %v", v.err)
	}
	t.Logf("%+v: %v", v, v.err)
	if !v.Measured && v.err == nil {
		t.Errorf("probe = %+v; want a measurement or an error", v)
	}
}
