package qemu

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/hypervisor"
)

// endpoints are the files and connections between the caller and QEMU. Those
// of the child are closed once it runs.
type endpoints struct {
	child       files
	childStderr *os.File

	console, qmp net.Conn
	stderr       *os.File
}

// open opens all of them, or none.
func (e *endpoints) open(s *hypervisor.Spec, passKVM bool) (err error) {
	defer func() {
		if err != nil {
			e.closeChild()
			e.closeParent()
		}
	}()
	if e.child.kernel, err = openImage("kernel", s.Kernel, checkKernel); err != nil {
		return err
	}
	if e.child.initrd, err = openImage("initrd", s.Initrd, nil); err != nil {
		return err
	}
	if passKVM {
		if e.child.kvm, err = os.OpenFile(kvmDevice, os.O_RDWR, 0); err != nil {
			return err
		}
	}
	if e.console, e.child.console, err = socketpair("console"); err != nil {
		return err
	}
	if e.qmp, e.child.qmp, err = socketpair("qmp"); err != nil {
		return err
	}
	e.stderr, e.childStderr, err = os.Pipe()
	return err
}

func (e *endpoints) closeChild() {
	c := &e.child
	for _, f := range []*os.File{c.kernel, c.initrd, c.kvm, c.console, c.qmp, e.childStderr} {
		if f != nil {
			f.Close()
		}
	}
}

func (e *endpoints) closeParent() {
	for _, c := range []net.Conn{e.console, e.qmp} {
		if c != nil {
			c.Close()
		}
	}
	if e.stderr != nil {
		e.stderr.Close()
	}
}

// setReadDeadline ends the readers of what QEMU writes at t.
func (e *endpoints) setReadDeadline(t time.Time) {
	e.console.SetReadDeadline(t)
	e.qmp.SetReadDeadline(t)
	e.stderr.SetReadDeadline(t)
}

// openImage opens the guest's kernel or initrd. A process with other rights
// may open it again through the descriptor if the file's mode lets it.
func openImage(what, path string, check func(*os.File) error) (*os.File, error) {
	// Without O_NONBLOCK a named pipe would block.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("guest %s: %w", what, err)
	}
	fi, err := f.Stat()
	switch {
	case err != nil:
	case !fi.Mode().IsRegular():
		err = errors.New("not a regular file")
	case fi.Size() == 0:
		err = errors.New("the file is empty")
	case check != nil:
		err = check(f)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("guest %s %s: %w", what, path, err)
	}
	return f, nil
}

// checkKernel returns an error unless f is of a form that microvm boots: an
// ELF file, or a bzImage, which has its magic number where the boot protocol
// says (Documentation/arch/x86/boot.rst in Linux).
func checkKernel(f *os.File) error {
	const setupHeader = 0x202
	head := make([]byte, setupHeader+4)
	if _, err := f.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if string(head[:4]) != "\x7fELF" && string(head[setupHeader:]) != "HdrS" {
		return errors.New("neither an ELF kernel nor a bzImage")
	}
	return nil
}

// socketpair returns a connection and its other end, to be inherited.
func socketpair(name string) (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("%s socket pair: %w", name, err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name)
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("%s socket pair: %w", name, err)
	}
	return conn, theirs, nil
}
