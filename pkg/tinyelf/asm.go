//go:build linux

package tinyelf

import "encoding/binary"

// amd64 encodes instructions as in the Intel SDM, volume 2. A load of 32 bits
// clears the register's upper half. System calls destroy rcx and r11 and
// return in rax; ebx is the counter.
type amd64 struct{ b []byte }

func (a *amd64) emit(b ...byte) { a.b = append(a.b, b...) }

func (a *amd64) imm(v uint32) { a.b = binary.LittleEndian.AppendUint32(a.b, v) }

func (a *amd64) pos() int     { return len(a.b) }
func (a *amd64) code() []byte { return a.b }

func (a *amd64) load(arg int, v uint32) {
	a.emit([][]byte{
		{0xbf},       // mov edi, imm32
		{0xbe},       // mov esi, imm32
		{0xba},       // mov edx, imm32
		{0x41, 0xba}, // mov r10d, imm32
		{0x41, 0xb8}, // mov r8d, imm32
		{0x41, 0xb9}, // mov r9d, imm32
	}[arg]...)
	a.imm(v)
}

// move copies register number from to the register of argument 0, 1 or 2
// (mov r/m32, r32 with both in registers).
func (a *amd64) move(arg int, from byte) { a.emit(0x89, 0xc0|from<<3|[]byte{7, 6, 2}[arg]) }

func (a *amd64) loadStack(arg int) {
	a.emit(0x48) // REX.W
	a.move(arg, 4)
}

func (a *amd64) loadCounter(arg int) { a.move(arg, 3) }

func (a *amd64) syscall(number uint32) {
	a.emit(0xb8) // mov eax, imm32
	a.imm(number)
	a.emit(0x0f, 0x05)
}

// rel32 emits a jump's distance, counted from the instruction's end.
func (a *amd64) rel32(target int) { a.imm(uint32(target - (a.pos() + 4))) }

func (a *amd64) jump(target int) {
	a.emit(0xe9) // jmp rel32
	a.rel32(target)
}

func (a *amd64) jumpIfBelow(n uint8, target int) {
	a.emit(0x83, 0xf8, n) // cmp eax, imm8
	a.emit(0x0f, 0x8c)    // jl rel32
	a.rel32(target)
}

func (a *amd64) clearCounter() { a.emit(0x31, 0xdb) } // xor ebx, ebx

func (a *amd64) countTo(n uint8, target int) {
	a.emit(0xff, 0xc3)    // inc ebx
	a.emit(0x83, 0xfb, n) // cmp ebx, imm8
	a.emit(0x0f, 0x85)    // jne rel32
	a.rel32(target)
}

// arm64 encodes instructions as in the Arm Architecture Reference Manual,
// chapter C6. System calls take their number in x8 and return in x0; x19 is
// the counter.
type arm64 struct{ b []byte }

func (a *arm64) emit(ins uint32) { a.b = binary.LittleEndian.AppendUint32(a.b, ins) }

func (a *arm64) pos() int     { return len(a.b) }
func (a *arm64) code() []byte { return a.b }

func (a *arm64) load(reg int, v uint32) {
	a.emit(0xd2800000 | v&0xffff<<5 | uint32(reg)) // movz x, #low
	a.emit(0xf2a00000 | v>>16<<5 | uint32(reg))    // movk x, #high, lsl 16
}

func (a *arm64) loadStack(reg int)   { a.emit(0x910003e0 | uint32(reg)) } // add x, sp, #0
func (a *arm64) loadCounter(reg int) { a.emit(0xaa1303e0 | uint32(reg)) } // orr x, xzr, x19

func (a *arm64) syscall(number uint32) {
	a.load(8, number)
	a.emit(0xd4000001) // svc #0
}

// words returns the distance from here to target in instructions, in n bits.
func (a *arm64) words(target int, n uint) uint32 {
	return uint32((target-a.pos())/4) & (1<<n - 1)
}

func (a *arm64) jump(target int) { a.emit(0x14000000 | a.words(target, 26)) } // b

func (a *arm64) jumpIfBelow(n uint8, target int) {
	a.emit(0x7100001f | uint32(n)<<10)          // cmp w0, #n
	a.emit(0x5400000b | a.words(target, 19)<<5) // b.lt
}

func (a *arm64) clearCounter() { a.emit(0xd2800013) } // movz x19, #0

func (a *arm64) countTo(n uint8, target int) {
	a.emit(0x91000673)                          // add x19, x19, #1
	a.emit(0xf100027f | uint32(n)<<10)          // cmp x19, #n
	a.emit(0x54000001 | a.words(target, 19)<<5) // b.ne
}
