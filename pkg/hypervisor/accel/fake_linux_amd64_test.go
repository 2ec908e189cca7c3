package accel

import (
	"encoding/binary"
	"io/fs"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Descriptors of the fake.
const (
	fakeKVM = 100 + iota
	fakeVM
	fakeVCPU
)

// fakeKernel is a KVM whose guest runs at a chosen speed on a clock of its own.
// It executes no instructions: it checks that the guest is set up to run the
// code in long mode, and does what that code does.
type fakeKernel struct {
	t *testing.T
	// nanos is the processor time that an instruction takes.
	nanos float64
	// firstSlice is added to the first slice.
	firstSlice time.Duration
	// hook, if it returns true, replaces an ioctl.
	hook func(k *fakeKernel, request uint) (handled bool, n int, err error)
	// openErr, if not nil, is open's.
	openErr error

	thread      time.Duration // the thread's processor time
	memory      []byte
	shared      []byte
	sregs       sregs
	regs        regs
	slices      int
	interrupted chan struct{} // buffered; a signal is pending

	mu     sync.Mutex
	opened map[int]bool // guarded by mu
	mapped int          // guarded by mu
}

func newFake(t *testing.T, nanos float64) *fakeKernel {
	return &fakeKernel{t: t, nanos: nanos, interrupted: make(chan struct{}, 1), opened: make(map[int]bool)}
}

func (k *fakeKernel) add(fd int) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.opened[fd] = true
	return fd
}

func (k *fakeKernel) open(path string) (int, error) {
	if k.openErr != nil {
		return -1, &fs.PathError{Op: "open", Path: path, Err: k.openErr}
	}
	return k.add(fakeKVM), nil
}

func (k *fakeKernel) close(fd int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.opened[fd] {
		k.t.Errorf("close(%d): not open", fd)
	}
	delete(k.opened, fd)
}

// left returns how many descriptors and mappings are not released.
func (k *fakeKernel) left() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.opened) + k.mapped
}

// owner is the descriptor that an ioctl belongs to.
var owner = map[uint]int{
	kvmGetAPIVersion: fakeKVM, kvmCreateVM: fakeKVM, kvmGetVCPUMmapSize: fakeKVM,
	kvmCreateVCPU: fakeVM, kvmSetUserMemoryRegion: fakeVM, kvmSetTSSAddr: fakeVM,
	kvmRun: fakeVCPU, kvmGetRegs: fakeVCPU, kvmSetRegs: fakeVCPU, kvmGetSregs: fakeVCPU, kvmSetSregs: fakeVCPU,
}

func (k *fakeKernel) enter(fd int, request uint) (handled bool, n int, err error) {
	k.mu.Lock()
	open := k.opened[fd]
	k.mu.Unlock()
	if want, ok := owner[request]; !ok || want != fd || !open {
		k.t.Errorf("ioctl(%d, %#x): want descriptor %d, open", fd, request, want)
		return true, 0, unix.EINVAL
	}
	if k.hook != nil {
		return k.hook(k, request)
	}
	return false, 0, nil
}

func (k *fakeKernel) ioctl(fd int, request uint, arg uintptr) (int, error) {
	if handled, n, err := k.enter(fd, request); handled {
		return n, err
	}
	switch request {
	case kvmGetAPIVersion:
		return 12, nil
	case kvmCreateVM:
		return k.add(fakeVM), nil
	case kvmGetVCPUMmapSize:
		return 3 << 12, nil
	case kvmCreateVCPU:
		return k.add(fakeVCPU), nil
	case kvmSetTSSAddr:
		if arg < memorySize {
			k.t.Errorf("KVM_SET_TSS_ADDR(%#x) is in the guest's memory", arg)
		}
		return 0, nil
	case kvmRun:
		return 0, k.run()
	}
	return 0, unix.ENOTTY
}

func (k *fakeKernel) ioctlPtr(fd int, request uint, arg unsafe.Pointer) error {
	if handled, _, err := k.enter(fd, request); handled {
		return err
	}
	switch request {
	case kvmSetUserMemoryRegion:
		r := (*userMemoryRegion)(arg)
		if want := uint64(uintptr(unsafe.Pointer(&k.memory[0]))); r.userspaceAddr != want || r.size != memorySize || r.guestPhysAddr != 0 {
			k.t.Errorf("KVM_SET_USER_MEMORY_REGION(%+v): want %d bytes from 0 at %#x", r, memorySize, want)
		}
	case kvmGetSregs:
		*(*sregs)(arg) = sregs{tr: segment{typ: 11, present: 1}, cr0: 0x60000010}
	case kvmSetSregs:
		k.sregs = *(*sregs)(arg)
	case kvmSetRegs:
		k.regs = *(*regs)(arg)
	case kvmGetRegs:
		*(*regs)(arg) = k.regs
	default:
		return unix.ENOTTY
	}
	return nil
}

// run is KVM_RUN up to the code's OUT.
func (k *fakeKernel) run() error {
	if immediateExit(k.shared).Load() != 0 {
		return unix.EINTR
	}
	k.checkGuest()
	if k.regs.r8 == rounds {
		k.slices++
	}
	if k.slices == 1 {
		k.thread += k.firstSlice
	}
	var sum uint64
	for n := k.regs.r8; n > 0; n-- {
		sum += n
	}
	k.thread += time.Duration(k.nanos * float64(k.regs.r8) * perRound)
	binary.LittleEndian.PutUint64(k.memory[k.regs.rbx:], sum)
	binary.LittleEndian.PutUint32(k.shared[runExitReason:], exitIO)
	k.shared[runIODirection] = 1
	binary.LittleEndian.PutUint16(k.shared[runIOPort:], donePort)
	return nil
}

// checkGuest follows the processor's way from its registers to the code.
func (k *fakeKernel) checkGuest() {
	s := &k.sregs
	const cr0, cr4, efer = 1<<31 | 1, 1 << 5, 1<<8 | 1<<10
	if s.cr0&cr0 != cr0 || s.cr4&cr4 != cr4 || s.efer&efer != efer || s.cs.l != 1 || s.cs.db != 0 || s.cs.dpl != 0 {
		k.t.Errorf("not 64-bit mode in ring 0: cr0 %#x, cr4 %#x, efer %#x, cs %+v", s.cr0, s.cr4, s.efer, s.cs)
	}
	if s.tr.present != 1 {
		k.t.Error("the task register that KVM had set was lost")
	}
	physical := func(virtual uint64) uint64 {
		at := s.cr3
		for _, shift := range []uint{39, 30, 21} {
			entry := binary.LittleEndian.Uint64(k.memory[at+virtual>>shift&511*8:])
			if entry&3 != 3 {
				k.t.Fatalf("address %#x: the entry for bits %d is %#x", virtual, shift, entry)
			}
			at = entry &^ 0xfff
			if shift == 21 && entry&(1<<7) == 0 {
				k.t.Fatalf("address %#x: not a large page", virtual)
			}
		}
		return at | virtual&(1<<21-1)
	}
	if at := physical(k.regs.rip); string(k.memory[at:at+uint64(len(code))]) != string(code) {
		k.t.Errorf("no code at %#x", at)
	}
	if at := physical(k.regs.rbx); at+8 > memorySize || at < uint64(len(code)) {
		k.t.Errorf("rbx points to %#x", at)
	}
}

// block waits like a system call that a signal ends.
func (k *fakeKernel) block() error {
	<-k.interrupted
	return unix.EINTR
}

func (k *fakeKernel) mapFile(fd, size int) ([]byte, error) {
	if fd != fakeVCPU || size != 3<<12 {
		k.t.Errorf("mmap(%d, %d)", fd, size)
	}
	k.shared = make([]byte, size)
	k.count(1)
	return k.shared, nil
}

func (k *fakeKernel) mapMemory(size int) ([]byte, error) {
	k.memory = make([]byte, size)
	k.count(1)
	return k.memory, nil
}

func (k *fakeKernel) unmap([]byte) { k.count(-1) }

func (k *fakeKernel) count(n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.mapped += n
}

func (k *fakeKernel) threadTime() (time.Duration, error) { return k.thread, nil }

func (k *fakeKernel) threadID() int { return 1 }

func (k *fakeKernel) interrupt(int) {
	select {
	case k.interrupted <- struct{}{}:
	default:
	}
}
