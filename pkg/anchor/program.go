//go:build linux

package anchor

import (
	"encoding/binary"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// The anchor's program is a static ELF file of one read-only segment that
// holds the headers, a little data and the code. The code makes these system
// calls, each of which must succeed, and exits with 1 otherwise:
//
//	read(0, sp, 1) = 1                wait until the root is prepared
//	prctl(PR_CAPBSET_DROP, 0..63)     any result
//	setgroups(0, NULL)
//	setresgid(65534, 65534, 65534)
//	setresuid(65534, 65534, 65534)    clears the permitted capabilities
//	capset(self, none)                clears the inheritable ones
//	prctl(PR_SET_NO_NEW_PRIVS, 1)
//	prctl(PR_SET_NAME, comm)
//	prctl(PR_SET_PDEATHSIG, SIGKILL)  setresuid has cleared it
//	write(1, comm, 1) = 1             report; fails if the shim is dead
//	close_range(0, ~0, 0)
//	ppoll(NULL, 0, NULL, NULL)        again and again

const (
	nobody = 65534
	// comm is the program's name in the process list, at most 15 bytes.
	comm = "vmrt-anchor"
)

// syscalls are the numbers of one architecture's system calls
// (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h).
type syscalls struct {
	read, write, prctl, setgroups, setresgid, setresuid, capset, closeRange, ppoll, exit uint32
}

// assembler emits the few instructions that the program is made of. Arguments
// are numbered from 0 as system calls count them. One register is a counter
// that system calls preserve.
type assembler interface {
	load(arg int, v uint32)
	loadStack(arg int)   // the stack pointer
	loadCounter(arg int) // the counter's value
	syscall(number uint32)
	jump(target int)
	// jumpIfBelow jumps if the last system call's result, signed, is < n.
	jumpIfBelow(n uint8, target int)
	clearCounter()
	// countTo adds 1 to the counter and jumps unless it then is n.
	countTo(n uint8, target int)
	// pos is the offset of the next instruction.
	pos() int
	code() []byte
}

// target is an architecture.
type target struct {
	machine  uint16 // e_machine
	syscalls syscalls
	newAsm   func() assembler
}

var targets = map[string]target{
	"amd64": {
		machine: 62, // EM_X86_64
		syscalls: syscalls{
			read: 0, write: 1, prctl: 157, setgroups: 116, setresgid: 119, setresuid: 117,
			capset: 126, closeRange: 436, ppoll: 271, exit: 60,
		},
		newAsm: func() assembler { return new(amd64) },
	},
	"arm64": {
		machine: 183, // EM_AARCH64
		syscalls: syscalls{
			read: 63, write: 64, prctl: 167, setgroups: 159, setresgid: 149, setresuid: 147,
			capset: 91, closeRange: 436, ppoll: 73, exit: 93,
		},
		newAsm: func() assembler { return new(arm64) },
	},
}

// program returns the anchor's executable for this machine.
func program() ([]byte, error) {
	t, ok := targets[runtime.GOARCH]
	if !ok {
		return nil, fmt.Errorf("anchor for %s: %w", runtime.GOARCH, unix.ENOTSUP)
	}
	return link(t), nil
}

// Layout of the file and, from loadAddr on, of the memory.
const (
	loadAddr = 0x400000

	ehdrSize = 64
	phdrSize = 56
	commOff  = ehdrSize + 2*phdrSize // 16 bytes
	hdrOff   = commOff + 16          // cap_user_header_t: version, pid 0
	capsOff  = hdrOff + 8            // cap_user_data_t[2]: zero
	codeOff  = capsOff + 24
)

// assemble returns the code and the offset in it of the first instruction.
func assemble(t target) (code []byte, entry int) {
	a, s := t.newAsm(), t.syscalls
	const stack, counter = ^uint32(1), ^uint32(2) // arguments that are not constants
	call := func(number uint32, args ...uint32) {
		for i, v := range args {
			switch v {
			case stack:
				a.loadStack(i)
			case counter:
				a.loadCounter(i)
			default:
				a.load(i, v)
			}
		}
		a.syscall(number)
	}

	fail := a.pos()
	call(s.exit, 1)
	must := func(min uint8, number uint32, args ...uint32) {
		call(number, args...)
		a.jumpIfBelow(min, fail)
	}

	entry = a.pos()
	must(1, s.read, 0, stack, 1)
	a.clearCounter()
	loop := a.pos()
	call(s.prctl, unix.PR_CAPBSET_DROP, counter, 0, 0, 0)
	a.countTo(64, loop)
	must(0, s.setgroups, 0, 0)
	must(0, s.setresgid, nobody, nobody, nobody)
	must(0, s.setresuid, nobody, nobody, nobody)
	must(0, s.capset, loadAddr+hdrOff, loadAddr+capsOff)
	must(0, s.prctl, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	must(0, s.prctl, unix.PR_SET_NAME, loadAddr+commOff, 0, 0, 0)
	must(0, s.prctl, unix.PR_SET_PDEATHSIG, uint32(unix.SIGKILL), 0, 0, 0)
	must(1, s.write, 1, loadAddr+commOff, 1)
	must(0, s.closeRange, 0, ^uint32(0), 0)
	loop = a.pos()
	call(s.ppoll, 0, 0, 0, 0)
	a.jump(loop)
	return a.code(), entry
}

// link returns the ELF file (elf(5)).
func link(t target) []byte {
	code, entry := assemble(t)
	le := binary.LittleEndian
	size := uint64(codeOff + len(code))
	f := make([]byte, codeOff, size)
	copy(f, "\x7fELF\x02\x01\x01") // 64-bit, little-endian, version 1
	le.PutUint16(f[16:], 2)        // e_type: ET_EXEC
	le.PutUint16(f[18:], t.machine)
	le.PutUint32(f[20:], 1) // e_version
	le.PutUint64(f[24:], uint64(loadAddr+codeOff+entry))
	le.PutUint64(f[32:], ehdrSize) // e_phoff
	le.PutUint16(f[52:], ehdrSize)
	le.PutUint16(f[54:], phdrSize)
	le.PutUint16(f[56:], 2) // e_phnum

	load := f[ehdrSize:]
	le.PutUint32(load, 1)             // PT_LOAD
	le.PutUint32(load[4:], 5)         // PF_R|PF_X
	le.PutUint64(load[16:], loadAddr) // p_vaddr
	le.PutUint64(load[24:], loadAddr) // p_paddr
	le.PutUint64(load[32:], size)     // p_filesz
	le.PutUint64(load[40:], size)     // p_memsz
	le.PutUint64(load[48:], 0x10000)  // p_align: the largest page

	stack := load[phdrSize:]
	le.PutUint32(stack, 0x6474e551) // PT_GNU_STACK
	le.PutUint32(stack[4:], 6)      // PF_R|PF_W: no code on the stack

	copy(f[commOff:], comm)
	le.PutUint32(f[hdrOff:], unix.LINUX_CAPABILITY_VERSION_3)
	return append(f, code...)
}
