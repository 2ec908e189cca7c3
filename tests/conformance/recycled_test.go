package conformance

import (
	"bytes"
	"encoding/binary"
	"path/filepath"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// The layout of the programs below: a page of headers and start code, and
// pages with a function each, as the file has them.
const (
	programBase  = 0x400000
	programPages = 256
	programPage  = 4096
	functionAt   = 0x40
)

// TestRecycledPages runs programs whose pages come from the shared folder, one
// after the other in the same memory. The daemon writes them there without the
// VMM knowing, and under TCG the VMM keeps what it has translated of a page until
// the guest's processor writes there: a program must not run its predecessor's
// code.
func TestRecycledPages(t *testing.T) {
	s := newShim(t, options{
		rootfs: func(dir string) {
			write(t, filepath.Join(dir, "bin/first"), program(0x200, 1111), 0o755)
			write(t, filepath.Join(dir, "bin/second"), program(0x400, 2222), 0o755)
		},
		spec: func(spec *specs.Spec) {
			spec.Process.Args = []string{"sleep", "1000"}
			// To drop the page cache.
			spec.Linux.ReadonlyPaths = nil
		},
	})
	s.mustCreate(nil, false)
	s.mustStart("")
	const rounds = `
		for i in 1 2 3 4 5 6; do
			echo 3 > /proc/sys/vm/drop_caches || exit 250
			first || echo first: $?
			echo 3 > /proc/sys/vm/drop_caches
			second || echo second: $?
		done`
	if out, errs, status := s.exec("rounds", "sh", "-c", rounds); out != "" || errs != "" || status != 0 {
		t.Errorf("programs that count wrong functions = %q, stderr %q, status %d; want none", out, errs, status)
	}
}

// program returns a static ELF program that calls a function in each of its
// pages. Its exit status is how many did not return result, or 255. start is
// where it begins in its first page.
func program(start int, result uint32) string {
	le := binary.LittleEndian
	imm := func(op []byte, v uint32) []byte { return le.AppendUint32(op, v) }

	image := make([]byte, (1+programPages)*programPage)
	for i := 1; i <= programPages; i++ {
		// mov eax, result; ret
		copy(image[i*programPage+functionAt:], append(imm([]byte{0xb8}, result), 0xc3))
	}
	copy(image[start:], bytes.Join([][]byte{
		{0x31, 0xdb}, // xor ebx, ebx
		imm([]byte{0xbe}, programBase+programPage+functionAt), // mov esi, first function
		imm([]byte{0xbd}, programPages),                       // mov ebp, pages
		{0xff, 0xd6},                                          // again: call rsi
		imm([]byte{0x3d}, result),                             // cmp eax, result
		{0x74, 0x02},                                          // je next
		{0xff, 0xc3},                                          // inc ebx
		imm([]byte{0x81, 0xc6}, programPage),                  // next: add esi, page
		{0xff, 0xcd},                                          // dec ebp
		{0x75, 0xeb},                                          // jnz again
		imm([]byte{0xbf}, 255),                                // mov edi, 255
		{0x39, 0xfb},                                          // cmp ebx, edi
		{0x0f, 0x42, 0xfb},                                    // cmovb edi, ebx
		imm([]byte{0xb8}, 231),                                // mov eax, exit_group
		{0x0f, 0x05},                                          // syscall
	}, nil))

	// ELF-64 object file format: the header and one PT_LOAD segment.
	var head bytes.Buffer
	head.WriteString("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	for _, v := range []any{
		uint16(2), uint16(62), uint32(1), uint64(programBase + start), // ET_EXEC, EM_X86_64
		uint64(64), uint64(0), uint32(0), // program headers, no sections
		uint16(64), uint16(56), uint16(1), uint16(0), uint16(0), uint16(0),

		uint32(1), uint32(5), uint64(0), // PT_LOAD, readable and executable
		uint64(programBase), uint64(programBase),
		uint64(len(image)), uint64(len(image)), uint64(programPage),
	} {
		binary.Write(&head, le, v)
	}
	copy(image, head.Bytes())
	return string(image)
}
