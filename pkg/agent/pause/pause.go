// Package pause is the first process of a pid namespace that containers share:
// a tiny program called /pause, as Kubernetes users know it, which reaps
// orphans and does nothing else.
//
// Whoever shares its pid namespace may get at what the process has, by
// /proc/1/root or ptrace(2). So it has an empty root in a mount namespace of its
// own and no capabilities.
package pause

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/tinyelf"
)

// name is what ps shows.
const name = "pause"

// Start calls start with a command that is ready to be started, in new
// namespaces as attr says. The folder dir gets another one, on which the program
// mounts its root in its own mount namespace.
func Start(dir string, attr syscall.SysProcAttr, start func(*exec.Cmd) error) error {
	program, err := tinyelf.Link(data(), write)
	if err != nil {
		return err
	}
	fd, err := tinyelf.Memfd(name, program)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := os.MkdirAll(filepath.Join(dir, root), 0o711); err != nil {
		return err
	}
	attr.Setsid = true
	attr.Cloneflags |= unix.CLONE_NEWNS
	return start(&exec.Cmd{
		Path: fmt.Sprintf("/proc/self/fd/%d", fd), Args: []string{"/" + name}, Env: []string{}, Dir: dir,
		SysProcAttr: &attr,
	})
}

// root is the folder below Start's dir on which the program mounts its root.
const root = "root"

// The program's data.
const (
	ignoreAddr = tinyelf.DataAddr // struct sigaction: SIG_IGN, no flags, no mask
	hdrAddr    = ignoreAddr + 32  // cap_user_header_t: version, pid 0
	capsAddr   = hdrAddr + 8      // cap_user_data_t[2]: zero
	tmpfsAddr  = capsAddr + 24
	rootAddr   = tmpfsAddr + 8
	hereAddr   = rootAddr + 8 // "."
	dataSize   = 32 + 8 + 24 + 8 + 8 + 2
)

func data() []byte {
	b := make([]byte, dataSize)
	b[0] = 1 // SIG_IGN
	binary.LittleEndian.PutUint32(b[hdrAddr-ignoreAddr:], unix.LINUX_CAPABILITY_VERSION_3)
	copy(b[tmpfsAddr-ignoreAddr:], "tmpfs")
	copy(b[rootAddr-ignoreAddr:], root)
	copy(b[hereAddr-ignoreAddr:], ".")
	return b
}

// write appends the program. It makes these system calls, each of which must
// succeed, and exits with 1 otherwise:
//
//	sigaction(SIGCHLD, SIG_IGN)            the kernel reaps what is left to it
//	mount("tmpfs", "root", "tmpfs", …)     empty and read-only
//	chdir("root")
//	pivot_root(".", ".")                   the old root is on top (pivot_root(2))
//	umount2(".", MNT_DETACH)
//	prctl(PR_SET_NO_NEW_PRIVS, 1)
//	capset(self, none)
//	close_range(0, ~0, 0)
//	ppoll(NULL, 0, NULL, NULL)             again and again
func write(p *tinyelf.Program) (entry int) {
	const (
		maskBytes = 8
		flags     = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	)
	s := p.Syscalls
	fail := p.Pos()
	p.Call(s.Exit, 1)
	must := func(number uint32, args ...uint32) {
		p.Call(number, args...)
		p.JumpIfBelow(0, fail)
	}

	entry = p.Pos()
	must(s.RtSigaction, uint32(unix.SIGCHLD), ignoreAddr, 0, maskBytes)
	must(s.Mount, tmpfsAddr, rootAddr, tmpfsAddr, flags, 0)
	must(s.Chdir, rootAddr)
	must(s.PivotRoot, hereAddr, hereAddr)
	must(s.Umount2, hereAddr, unix.MNT_DETACH)
	must(s.Prctl, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	must(s.Capset, hdrAddr, capsAddr)
	must(s.CloseRange, 0, ^uint32(0), 0)
	loop := p.Pos()
	p.Call(s.Ppoll, 0, 0, 0, 0)
	p.Jump(loop)
	return entry
}
