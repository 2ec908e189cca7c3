package accel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The guest: a page of code and data, its page tables, in one memory slot.
const (
	memorySize = 5 << 12
	codePage   = 0x0000
	pml4Page   = 0x1000
	pdptPage   = 0x2000
	pdPage     = 0x3000
	dataPage   = 0x4000

	donePort = 0x10
)

// code adds the numbers from r8 down to 1 in rax, through the memory at rbx,
// then writes to donePort, and begins anew.
var code = []byte{
	0x4c, 0x89, 0xc1, //       start: mov rcx, r8
	0x31, 0xc0, //                    xor eax, eax
	0x48, 0x01, 0xc8, //       next:  add rax, rcx
	0x48, 0x89, 0x03, //              mov [rbx], rax
	0x48, 0x8b, 0x33, //              mov rsi, [rbx]
	0x48, 0xff, 0xc9, //              dec rcx
	0x75, 0xf2, //                    jnz next
	0xe6, donePort, //                out donePort, al
	0xeb, 0xe9, //                    jmp start
}

const (
	perRound = 5 // instructions between next and jnz
	rounds   = 2000
	// slices is how many runs of rounds must be slow for the verdict "slow",
	// and hurriedSlices how many suffice after the soft limit. One is not
	// enough: the host may have been busy with other things.
	slices        = 3
	hurriedSlices = 2
	// enough is how many instructions of a slice that was interrupted say
	// something about its speed.
	enough = 500
)

// probe measures on the kernel's KVM.
func probe(ctx context.Context, device string, hard time.Duration) verdict {
	return probeOn(ctx, host{}, device, SoftLimit, hard)
}

// probeOn runs the measurement on a thread of its own, hurries it at soft and
// leaves it at hard.
func probeOn(ctx context.Context, sys system, device string, soft, hard time.Duration) verdict {
	m := &measurement{sys: sys, device: device}
	result := make(chan verdict, 1)
	go func() {
		// The thread ends with the goroutine: nobody else gets one that
		// was interrupted or is stuck.
		runtime.LockOSThread()
		result <- m.run()
	}()
	hurry, giveUp := time.NewTimer(soft), time.NewTimer(hard)
	defer hurry.Stop()
	defer giveUp.Stop()
	for {
		select {
		case v := <-result:
			return v
		case <-hurry.C:
			m.hurried.Store(true)
			m.interrupt()
		case <-giveUp.C:
			m.abandon()
			return verdict{err: fmt.Errorf("%s: no answer from the kernel within %v to %s", device, hard, m.doing())}
		case <-ctx.Done():
			m.abandon()
			return verdict{err: context.Cause(ctx)}
		}
	}
}

// measurement is one probe. run belongs to its thread; the other methods to
// anybody.
type measurement struct {
	sys    system
	device string
	// step names the system call that the thread is in.
	step      atomic.Value // string
	hurried   atomic.Bool
	abandoned atomic.Bool

	memory  []byte
	kvm, vm int
	vcpu    int

	mu     sync.Mutex
	thread int    // guarded by mu; 0 while there is none
	shared []byte // guarded by mu; the virtual CPU's kvm_run, nil while there is none
}

// interrupt gets the thread out of the guest.
func (m *measurement) interrupt() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.shared != nil {
		// For a thread that is just about to enter.
		immediateExit(m.shared).Store(leaveNow)
	}
	if m.thread != 0 {
		m.sys.interrupt(m.thread)
	}
}

// abandon makes the thread clean up behind itself and end, if it ever can.
func (m *measurement) abandon() {
	m.abandoned.Store(true)
	m.interrupt()
}

func (m *measurement) doing() string {
	s, _ := m.step.Load().(string)
	return s
}

func (m *measurement) run() verdict {
	m.mu.Lock()
	m.thread = m.sys.threadID()
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		m.thread = 0
		m.mu.Unlock()
	}()
	m.kvm, m.vm, m.vcpu = -1, -1, -1
	defer m.release()
	if err := m.create(); err != nil {
		return verdict{err: err}
	}
	if err := m.enterLongMode(); err != nil {
		return verdict{err: err}
	}
	if err := m.warmUp(); err != nil {
		return verdict{err: err}
	}
	return m.measure()
}

// create makes a virtual machine with a virtual CPU and its memory.
func (m *measurement) create() (err error) {
	m.step.Store("open")
	if m.kvm, err = m.sys.open(m.device); err != nil {
		return err
	}
	version, err := m.ioctl("KVM_GET_API_VERSION", m.kvm, kvmGetAPIVersion, 0)
	if err != nil {
		return err
	}
	if version != kvmAPIVersion {
		return fmt.Errorf("%s: KVM API version %d: want %d", m.device, version, kvmAPIVersion)
	}
	if m.vm, err = m.ioctl("KVM_CREATE_VM", m.kvm, kvmCreateVM, 0); err != nil {
		m.vm = -1
		return err
	}
	// Intel's processors without unrestricted guests need three pages that
	// the guest does not use.
	if _, err = m.ioctl("KVM_SET_TSS_ADDR", m.vm, kvmSetTSSAddr, 0xfffbd000); err != nil {
		return err
	}
	if m.memory, err = m.sys.mapMemory(memorySize); err != nil {
		return err
	}
	m.fillMemory()
	region := userMemoryRegion{size: memorySize, userspaceAddr: uint64(uintptr(unsafe.Pointer(&m.memory[0])))}
	if err := m.ioctlPtr("KVM_SET_USER_MEMORY_REGION", m.vm, kvmSetUserMemoryRegion, unsafe.Pointer(&region)); err != nil {
		return err
	}
	if m.vcpu, err = m.ioctl("KVM_CREATE_VCPU", m.vm, kvmCreateVCPU, 0); err != nil {
		m.vcpu = -1
		return err
	}
	return m.mapShared()
}

func (m *measurement) mapShared() error {
	size, err := m.ioctl("KVM_GET_VCPU_MMAP_SIZE", m.kvm, kvmGetVCPUMmapSize, 0)
	if err != nil {
		return err
	}
	if size < runSize || size > 1<<20 {
		return fmt.Errorf("%s: a shared structure of %d bytes", m.device, size)
	}
	shared, err := m.sys.mapFile(m.vcpu, size)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.shared = shared
	m.mu.Unlock()
	return nil
}

// fillMemory writes the code, and tables that map the first 2 MiB of virtual
// addresses to the same physical ones (Intel SDM volume 3, 4.5).
func (m *measurement) fillMemory() {
	const (
		present, writable = 1 << 0, 1 << 1
		large             = 1 << 7
	)
	copy(m.memory[codePage:], code)
	binary.LittleEndian.PutUint64(m.memory[pml4Page:], pdptPage|present|writable)
	binary.LittleEndian.PutUint64(m.memory[pdptPage:], pdPage|present|writable)
	binary.LittleEndian.PutUint64(m.memory[pdPage:], 0|present|writable|large)
}

// enterLongMode sets the virtual CPU up to run the code in 64-bit mode, in ring
// 0, as a kernel does.
func (m *measurement) enterLongMode() error {
	const (
		cr0PE, cr0PG     = 1 << 0, 1 << 31
		cr4PAE           = 1 << 5
		eferLME, eferLMA = 1 << 8, 1 << 10
		codeType         = 11 // execute, read, accessed
		dataType         = 3  // read, write, accessed
	)
	var s sregs
	if err := m.ioctlPtr("KVM_GET_SREGS", m.vcpu, kvmGetSregs, unsafe.Pointer(&s)); err != nil {
		return err
	}
	flat := segment{limit: 0xffffffff, present: 1, s: 1, g: 1}
	s.cs, s.ss = flat, flat
	s.cs.typ, s.cs.selector, s.cs.l = codeType, 1<<3, 1
	s.ss.typ, s.ss.selector, s.ss.db = dataType, 2<<3, 1
	s.ds, s.es, s.fs, s.gs = s.ss, s.ss, s.ss, s.ss
	s.cr0 |= cr0PE | cr0PG
	s.cr3 = pml4Page
	s.cr4 |= cr4PAE
	s.efer |= eferLME | eferLMA
	if err := m.ioctlPtr("KVM_SET_SREGS", m.vcpu, kvmSetSregs, unsafe.Pointer(&s)); err != nil {
		return err
	}
	r := regs{rip: codePage, rflags: 2, rbx: dataPage, r8: 1}
	return m.ioctlPtr("KVM_SET_REGS", m.vcpu, kvmSetRegs, unsafe.Pointer(&r))
}

// warmUp runs a single round, in which the guest's pages are faulted in, and
// leaves the guest ready for whole slices.
func (m *measurement) warmUp() error {
	for {
		_, err := m.enter()
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EINTR) || m.abandoned.Load() {
			return err
		}
	}
	if err := m.checkExit(1); err != nil {
		return err
	}
	var r regs
	if err := m.ioctlPtr("KVM_GET_REGS", m.vcpu, kvmGetRegs, unsafe.Pointer(&r)); err != nil {
		return err
	}
	r.r8 = rounds
	return m.ioctlPtr("KVM_SET_REGS", m.vcpu, kvmSetRegs, unsafe.Pointer(&r))
}

// measure runs slices until one is fast, or enough are slow.
func (m *measurement) measure() verdict {
	var v verdict
	for done := 0; done < slices && (done < hurriedSlices || !m.hurried.Load()); {
		nanos, err := m.slice()
		if err != nil {
			return verdict{err: err}
		}
		if nanos == 0 {
			continue
		}
		done++
		if !v.Measured || nanos < v.NanosPerInstruction {
			v.Measured, v.NanosPerInstruction = true, nanos
		}
		if nanos < slow {
			break
		}
	}
	return v
}

// slice runs the guest to its next exit and returns its speed in nanoseconds
// an instruction, 0 if it was interrupted too early to tell.
func (m *measurement) slice() (nanos float64, err error) {
	binary.LittleEndian.PutUint64(m.memory[dataPage:], 0)
	took, err := m.enter()
	executed := rounds * perRound
	switch {
	case m.abandoned.Load():
		return 0, errors.New("abandoned")
	case errors.Is(err, unix.EINTR):
		if executed, err = m.progress(); err != nil || executed < enough {
			return 0, err
		}
	case err != nil:
		return 0, err
	default:
		if err := m.checkExit(rounds); err != nil {
			return 0, err
		}
	}
	return float64(max(took, 1)) / float64(executed), nil
}

// enter runs the guest to its next exit and returns the processor time it took.
func (m *measurement) enter() (time.Duration, error) {
	before, err := m.sys.threadTime()
	if err != nil {
		return 0, err
	}
	_, runErr := m.ioctl("KVM_RUN", m.vcpu, kvmRun, 0)
	after, err := m.sys.threadTime()
	if err != nil {
		return 0, err
	}
	if errors.Is(runErr, unix.EINTR) {
		m.mu.Lock()
		immediateExit(m.shared).Store(0)
		m.mu.Unlock()
	}
	return after - before, runErr
}

// progress ends a slice that was interrupted, returning how many instructions
// of it are done.
func (m *measurement) progress() (int, error) {
	var r regs
	if err := m.ioctlPtr("KVM_GET_REGS", m.vcpu, kvmGetRegs, unsafe.Pointer(&r)); err != nil {
		return 0, err
	}
	if r.rcx > rounds {
		return 0, fmt.Errorf("%s: the guest's counter is %d: want at most %d", m.device, r.rcx, rounds)
	}
	executed := int(rounds-r.rcx) * perRound
	if binary.LittleEndian.Uint64(m.memory[dataPage:]) == 0 {
		executed = 0 // rcx is the slice's before
	}
	// The next slice is a whole one.
	r.rip, r.rcx = codePage, 0
	return executed, m.ioctlPtr("KVM_SET_REGS", m.vcpu, kvmSetRegs, unsafe.Pointer(&r))
}

// checkExit checks that the guest finished its sum of the numbers up to n.
func (m *measurement) checkExit(n uint64) error {
	reason := binary.LittleEndian.Uint32(m.shared[runExitReason:])
	port := binary.LittleEndian.Uint16(m.shared[runIOPort:])
	if reason != exitIO || m.shared[runIODirection] != 1 || port != donePort {
		return fmt.Errorf("%s: the guest ended with exit %d%s", m.device, reason, exitName(reason))
	}
	sum := binary.LittleEndian.Uint64(m.memory[dataPage:])
	if want := n * (n + 1) / 2; sum != want {
		return fmt.Errorf("%s: the guest's sum is %d: want %d", m.device, sum, want)
	}
	return nil
}

func exitName(reason uint32) string {
	switch reason {
	case exitShutdown:
		return " (triple fault)"
	case exitFailEntry:
		return " (the processor refused to enter it)"
	case exitInternalError:
		return " (internal error)"
	}
	return ""
}

// ioctl asks again when it was interrupted, unless it runs the guest.
func (m *measurement) ioctl(name string, fd int, request uint, arg uintptr) (n int, err error) {
	err = m.call(name, request != kvmRun, func() (err error) {
		n, err = m.sys.ioctl(fd, request, arg)
		return err
	})
	return n, err
}

func (m *measurement) ioctlPtr(name string, fd int, request uint, arg unsafe.Pointer) error {
	return m.call(name, true, func() error { return m.sys.ioctlPtr(fd, request, arg) })
}

func (m *measurement) call(name string, again bool, ioctl func() error) error {
	m.step.Store(name)
	for {
		err := ioctl()
		if err == nil {
			return nil
		}
		if !again || !errors.Is(err, unix.EINTR) || m.abandoned.Load() {
			return fmt.Errorf("%s: %s: %w", m.device, name, err)
		}
	}
}

// release undoes create, however far it came.
func (m *measurement) release() {
	m.mu.Lock()
	shared := m.shared
	m.shared = nil
	m.mu.Unlock()
	if shared != nil {
		m.sys.unmap(shared)
	}
	for _, fd := range []int{m.vcpu, m.vm, m.kvm} {
		if fd >= 0 {
			m.sys.close(fd)
		}
	}
	if m.memory != nil {
		m.sys.unmap(m.memory)
	}
}
