// Package pause is the first process of a pid namespace that containers share:
// a tiny program called /pause, as Kubernetes users know it, which reaps
// orphans and does nothing else.
package pause

import (
	"fmt"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/tinyelf"
)

// name is what ps shows.
const name = "pause"

// Start calls start with a command that is ready to be started, in new
// namespaces as attr says.
func Start(attr syscall.SysProcAttr, start func(*exec.Cmd) error) error {
	program, err := tinyelf.Link(data, write)
	if err != nil {
		return err
	}
	fd, err := tinyelf.Memfd(name, program)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	attr.Setsid = true
	return start(&exec.Cmd{
		Path: fmt.Sprintf("/proc/self/fd/%d", fd), Args: []string{"/" + name}, Env: []string{}, Dir: "/",
		SysProcAttr: &attr,
	})
}

// data is the program's struct sigaction: SIG_IGN, no flags, no mask.
var data = []byte{31: 0, 0: 1}

// write appends the program: it ignores SIGCHLD, so that the kernel reaps what
// is left to it (sigaction(2)), and sleeps.
func write(p *tinyelf.Program) (entry int) {
	const maskBytes = 8
	entry = p.Pos()
	p.Call(p.Syscalls.RtSigaction, uint32(unix.SIGCHLD), tinyelf.DataAddr, 0, maskBytes)
	p.Call(p.Syscalls.CloseRange, 0, ^uint32(0), 0)
	loop := p.Pos()
	p.Call(p.Syscalls.Ppoll, 0, 0, 0, 0)
	p.Jump(loop)
	return entry
}
