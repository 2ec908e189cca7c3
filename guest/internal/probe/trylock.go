//go:build linux

package main

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// trylock is patch 0015: a splice between a pipe and a socket does not wait for
// whoever has the pipe locked, which a writer has while its memory is paged in.
func trylock() error {
	const (
		flags = unix.SPLICE_F_NONBLOCK | 0x10 // SPLICE_F_TRYLOCK
		size  = 4096
	)
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if _, err := unix.Splice(pipe[0], nil, pair[0], nil, size, flags); err != unix.EAGAIN {
		return fmt.Errorf("splice of an empty pipe: %w", err)
	}
	page, fill, err := absent(size)
	if err != nil {
		return err
	}
	written := make(chan error, 1)
	go func() {
		// Not unix.Write: a race detector would look at the page.
		_, _, errno := unix.Syscall(unix.SYS_WRITE, uintptr(pipe[1]), page, size)
		written <- errnoError(errno)
	}()
	if err := fill(func() error {
		if n, err := unix.Splice(pipe[0], nil, pair[0], nil, size, flags); err != unix.EBUSY {
			return fmt.Errorf("splice of a locked pipe = %d, %v; want EBUSY", n, err)
		}
		return nil
	}); err != nil {
		return err
	}
	if err := <-written; err != nil {
		return fmt.Errorf("write from memory that was absent: %w", err)
	}
	if n, err := unix.Splice(pipe[0], nil, pair[0], nil, size, flags); n != size || err != nil {
		return fmt.Errorf("splice once the pipe is unlocked = %d, %v; want %d bytes", n, err, size)
	}
	return nil
}

// absent returns memory whose first reader waits until fill has called
// meanwhile and then filled it. The structures and numbers of userfaultfd are
// of include/uapi/linux/userfaultfd.h.
func absent(size uintptr) (addr uintptr, fill func(meanwhile func() error) error, err error) {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if errno != 0 {
		return 0, nil, fmt.Errorf("userfaultfd: %w", errno)
	}
	addr, _, errno = unix.Syscall6(unix.SYS_MMAP, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, ^uintptr(0), 0)
	if errno != 0 {
		return 0, nil, fmt.Errorf("mmap: %w", errno)
	}
	request := func(number uintptr, fields ...uint64) error {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, number, uintptr(unsafe.Pointer(&fields[0])))
		return errnoError(errno)
	}
	if err := request(0xc018aa3f, 0xaa, 0, 0); err != nil { // UFFDIO_API
		return 0, nil, fmt.Errorf("UFFDIO_API: %w", err)
	}
	// UFFDIO_REGISTER, UFFDIO_REGISTER_MODE_MISSING
	if err := request(0xc020aa00, uint64(addr), uint64(size), 1, 0); err != nil {
		return 0, nil, fmt.Errorf("UFFDIO_REGISTER: %w", err)
	}
	return addr, func(meanwhile func() error) error {
		var event [32]byte // struct uffd_msg
		if _, err := unix.Read(int(fd), event[:]); err != nil {
			return fmt.Errorf("read of userfaultfd: %w", err)
		}
		if got := binary.NativeEndian.Uint64(event[16:]); got&^4095 != uint64(addr) {
			return fmt.Errorf("page fault at %#x; want %#x", got, addr)
		}
		err := meanwhile()
		if e := request(0xc020aa04, uint64(addr), uint64(size), 0, 0); e != nil { // UFFDIO_ZEROPAGE
			return fmt.Errorf("UFFDIO_ZEROPAGE: %w", e)
		}
		return err
	}, nil
}

func errnoError(errno unix.Errno) error {
	if errno != 0 {
		return errno
	}
	return nil
}
