package accel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What the probe needs of KVM's interface (include/uapi/linux/kvm.h and
// arch/x86/include/uapi/asm/kvm.h in Linux).
const (
	kvmGetAPIVersion       = 0xae00
	kvmCreateVM            = 0xae01
	kvmGetVCPUMmapSize     = 0xae04
	kvmCreateVCPU          = 0xae41
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmSetTSSAddr          = 0xae47
	kvmRun                 = 0xae80
	kvmGetRegs             = 0x8090ae81
	kvmSetRegs             = 0x4090ae82
	kvmGetSregs            = 0x8138ae83
	kvmSetSregs            = 0x4138ae84

	// kvmAPIVersion is the only one there ever was.
	kvmAPIVersion = 12
)

// Exits of struct kvm_run.
const (
	exitIO            = 2
	exitShutdown      = 8
	exitFailEntry     = 9
	exitInternalError = 17
)

// Offsets in struct kvm_run.
const (
	runExitReason  = 8
	runIODirection = 32
	runIOPort      = 34
	runSize        = 2352
)

// leaveNow makes KVM_RUN return before it enters the guest: the second byte of
// struct kvm_run, immediate_exit, is not 0.
const leaveNow = 1 << 8

// immediateExit returns the first word of a struct kvm_run. It is the one part
// of it that others than the virtual CPU's thread write.
func immediateExit(shared []byte) *atomic.Uint32 {
	return (*atomic.Uint32)(unsafe.Pointer(&shared[0]))
}

type userMemoryRegion struct {
	slot, flags         uint32
	guestPhysAddr, size uint64
	userspaceAddr       uint64
}

type regs struct {
	rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp uint64
	r8, r9, r10, r11, r12, r13, r14, r15   uint64
	rip, rflags                            uint64
}

type segment struct {
	base                                              uint64
	limit                                             uint32
	selector                                          uint16
	typ, present, dpl, db, s, l, g, avl, unusable, _p uint8
}

type table struct {
	base  uint64
	limit uint16
	_     [3]uint16
}

type sregs struct {
	cs, ds, es, fs, gs, ss, tr, ldt segment
	gdt, idt                        table
	cr0, cr2, cr3, cr4, cr8         uint64
	efer, apicBase                  uint64
	interrupts                      [4]uint64
}

// system is what the probe asks of the kernel. host is the kernel; tests have
// one that misbehaves.
type system interface {
	open(path string) (fd int, err error)
	close(fd int)
	// ioctl passes a number or nothing.
	ioctl(fd int, request uint, arg uintptr) (int, error)
	// ioctlPtr passes a structure of KVM's.
	ioctlPtr(fd int, request uint, arg unsafe.Pointer) error
	// mapFile maps a virtual CPU's shared structure, mapMemory fresh memory.
	mapFile(fd, size int) ([]byte, error)
	mapMemory(size int) ([]byte, error)
	unmap(b []byte)
	// threadTime is the processor time that the calling thread has used, in
	// the guest or out of it. Waiting for a processor is not in it.
	threadTime() (time.Duration, error)
	// threadID names the calling thread to interrupt, which makes a system
	// call that the thread is in return EINTR if it can.
	threadID() int
	interrupt(thread int)
}

type host struct{}

func (host) open(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

func (host) close(fd int) { _ = unix.Close(fd) }

func (host) ioctl(fd int, request uint, arg uintptr) (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), arg)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func (host) ioctlPtr(fd int, request uint, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

func (host) mapFile(fd, size int) ([]byte, error) {
	b, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	return b, os.NewSyscallError("mmap", err)
}

func (host) mapMemory(size int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	return b, os.NewSyscallError("mmap", err)
}

func (host) unmap(b []byte) { _ = unix.Munmap(b) }

func (host) threadTime() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		return 0, os.NewSyscallError("clock_gettime", err)
	}
	return time.Duration(ts.Nano()), nil
}

func (host) threadID() int { return unix.Gettid() }

// interrupt uses the signal by which Go preempts its own threads: it may come
// at any time and does nothing else to them.
func (host) interrupt(thread int) { _ = unix.Tgkill(unix.Getpid(), thread, unix.SIGURG) }

// nodeOf names a device node.
func nodeOf(fi fs.FileInfo) (string, error) {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || fi.Mode()&fs.ModeCharDevice == 0 {
		return "", errors.New("not a character device")
	}
	return fmt.Sprintf("%x:%x:%d.%09d", st.Rdev, st.Ino, st.Ctim.Sec, st.Ctim.Nsec), nil
}
