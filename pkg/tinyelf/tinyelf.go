//go:build linux

// Package tinyelf makes programs of a few hundred bytes out of system calls:
// processes that only have to be there, such as the first process of a pid
// namespace, cost a page or two of memory and start in no time.
//
// A program is a static ELF file (elf(5)) of one read-only segment that holds
// the headers, a little data and the code. It has no stack but the kernel's,
// no libraries and no environment.
package tinyelf

import (
	"encoding/binary"
	"fmt"
	"maps"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"
)

// Syscalls are the numbers of one architecture's system calls
// (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h).
type Syscalls struct {
	Read, Write, Prctl, Setgroups, Setresgid, Setresuid, Capset, CloseRange, Ppoll, RtSigaction, Exit uint32
	Mount, Umount2, PivotRoot, Chdir                                                                  uint32
}

// assembler emits the few instructions that programs are made of. Arguments
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

// architecture is what programs can be made for.
type architecture struct {
	machine  uint16 // e_machine
	syscalls Syscalls
	newAsm   func() assembler
}

var architectures = map[string]architecture{
	"amd64": {
		machine: 62, // EM_X86_64
		syscalls: Syscalls{
			Read: 0, Write: 1, Prctl: 157, Setgroups: 116, Setresgid: 119, Setresuid: 117,
			Capset: 126, CloseRange: 436, Ppoll: 271, RtSigaction: 13, Exit: 60,
			Mount: 165, Umount2: 166, PivotRoot: 155, Chdir: 80,
		},
		newAsm: func() assembler { return new(amd64) },
	},
	"arm64": {
		machine: 183, // EM_AARCH64
		syscalls: Syscalls{
			Read: 63, Write: 64, Prctl: 167, Setgroups: 159, Setresgid: 149, Setresuid: 147,
			Capset: 91, CloseRange: 436, Ppoll: 73, RtSigaction: 134, Exit: 93,
			Mount: 40, Umount2: 39, PivotRoot: 41, Chdir: 49,
		},
		newAsm: func() assembler { return new(arm64) },
	},
}

// Architectures are the values of GOARCH that LinkFor knows.
func Architectures() []string { return slices.Sorted(maps.Keys(architectures)) }

// Arguments of Call that are not constants.
const (
	// Stack is the stack pointer, which points at memory that may be written.
	Stack = ^uint32(1)
	// Counter is the counter's value.
	Counter = ^uint32(2)
)

// Layout of the file and, from loadAddr on, of the memory.
const (
	loadAddr = 0x400000
	ehdrSize = 64
	phdrSize = 56
	dataOff  = ehdrSize + 2*phdrSize
	// DataAddr is where a program's data is in memory. It cannot be written.
	DataAddr = loadAddr + dataOff
)

// Program is a program that is being written. Its methods append instructions;
// positions are what Pos has returned.
type Program struct {
	asm assembler
	// Syscalls are the numbers for Call.
	Syscalls Syscalls
}

// Pos returns the position of the next instruction.
func (p *Program) Pos() int { return p.asm.pos() }

// Call makes a system call of at most six arguments: constants, Stack, Counter.
func (p *Program) Call(number uint32, args ...uint32) {
	for i, v := range args {
		switch v {
		case Stack:
			p.asm.loadStack(i)
		case Counter:
			p.asm.loadCounter(i)
		default:
			p.asm.load(i, v)
		}
	}
	p.asm.syscall(number)
}

// Jump goes to target.
func (p *Program) Jump(target int) { p.asm.jump(target) }

// JumpIfBelow goes to target if the last system call's result is below n.
func (p *Program) JumpIfBelow(n uint8, target int) { p.asm.jumpIfBelow(n, target) }

// ClearCounter sets the counter to 0.
func (p *Program) ClearCounter() { p.asm.clearCounter() }

// CountTo adds 1 to the counter and goes to target unless it then is n.
func (p *Program) CountTo(n uint8, target int) { p.asm.countTo(n, target) }

// Link returns the program for this machine. write appends its instructions
// and returns the position of the first to run.
func Link(data []byte, write func(*Program) (entry int)) ([]byte, error) {
	return LinkFor(runtime.GOARCH, data, write)
}

// LinkFor is Link for another architecture.
func LinkFor(arch string, data []byte, write func(*Program) (entry int)) ([]byte, error) {
	a, ok := architectures[arch]
	if !ok {
		return nil, fmt.Errorf("program for %s: %w", arch, unix.ENOTSUP)
	}
	p := &Program{asm: a.newAsm(), Syscalls: a.syscalls}
	entry := write(p)
	return link(a.machine, data, p.asm.code(), entry), nil
}

// link puts the file together.
func link(machine uint16, data, code []byte, entry int) []byte {
	le := binary.LittleEndian
	codeOff := dataOff + (len(data)+7)/8*8
	size := uint64(codeOff + len(code))
	f := make([]byte, codeOff, size)
	copy(f, "\x7fELF\x02\x01\x01") // 64-bit, little-endian, version 1
	le.PutUint16(f[16:], 2)        // e_type: ET_EXEC
	le.PutUint16(f[18:], machine)
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

	copy(f[dataOff:], data)
	return append(f, code...)
}

// Memfd returns the program as a file that has no name, ready to be executed
// by the path /proc/self/fd/N. name is shown in /proc only.
func Memfd(name string, program []byte) (int, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_EXEC)
	if err == unix.EINVAL { // MFD_EXEC: Linux 6.3
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	}
	if err != nil {
		return -1, fmt.Errorf("memfd_create: %w", err)
	}
	for len(program) > 0 {
		n, err := unix.Write(fd, program)
		if err != nil {
			unix.Close(fd)
			return -1, fmt.Errorf("write program %s: %w", name, err)
		}
		program = program[n:]
	}
	return fd, nil
}
