//go:build linux

package anchor

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/tinyelf"
)

const (
	nobody = 65534
	// comm is the program's name in the process list, at most 15 bytes.
	comm = "vmrt-anchor"
)

// The program's data.
const (
	commAddr = tinyelf.DataAddr
	hdrAddr  = commAddr + 16 // cap_user_header_t: version, pid 0
	capsAddr = hdrAddr + 8   // cap_user_data_t[2]: zero
	dataSize = 16 + 8 + 24
)

func data() []byte {
	b := make([]byte, dataSize)
	copy(b, comm)
	binary.LittleEndian.PutUint32(b[hdrAddr-commAddr:], unix.LINUX_CAPABILITY_VERSION_3)
	return b
}

// write appends the anchor's program. It makes these system calls, each of
// which must succeed, and exits with 1 otherwise:
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
func write(p *tinyelf.Program) (entry int) {
	s := p.Syscalls
	fail := p.Pos()
	p.Call(s.Exit, 1)
	must := func(min uint8, number uint32, args ...uint32) {
		p.Call(number, args...)
		p.JumpIfBelow(min, fail)
	}

	entry = p.Pos()
	must(1, s.Read, 0, tinyelf.Stack, 1)
	p.ClearCounter()
	loop := p.Pos()
	p.Call(s.Prctl, unix.PR_CAPBSET_DROP, tinyelf.Counter, 0, 0, 0)
	p.CountTo(64, loop)
	must(0, s.Setgroups, 0, 0)
	must(0, s.Setresgid, nobody, nobody, nobody)
	must(0, s.Setresuid, nobody, nobody, nobody)
	must(0, s.Capset, hdrAddr, capsAddr)
	must(0, s.Prctl, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	must(0, s.Prctl, unix.PR_SET_NAME, commAddr, 0, 0, 0)
	must(0, s.Prctl, unix.PR_SET_PDEATHSIG, uint32(unix.SIGKILL), 0, 0, 0)
	must(1, s.Write, 1, commAddr, 1)
	must(0, s.CloseRange, 0, ^uint32(0), 0)
	loop = p.Pos()
	p.Call(s.Ppoll, 0, 0, 0, 0)
	p.Jump(loop)
	return entry
}

// program returns the anchor's executable for this machine.
func program() ([]byte, error) { return tinyelf.Link(data(), write) }
