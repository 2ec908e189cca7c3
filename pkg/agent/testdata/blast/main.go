// Command blast moves bytes as fast as it can, for benchmarks: it writes to
// stdout or a vsock connection to the host, or reads stdin or such a
// connection to its end.
//
//	blast write|read stdio|PORT BYTES
//
// A byte of its own says that it is ready, and after a read another one that
// all is there, so that neither its start nor its end need be measured.
//
// It makes system calls as a C program does. Go's own have the runtime look
// after a call that takes a while every 20 us, which under emulation costs more
// than the call.
package main

import (
	"fmt"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, "blast:", err)
		os.Exit(1)
	}
}

func run(mode, where, count string) error {
	n, err := strconv.Atoi(count)
	if err != nil {
		return err
	}
	in, out := 0, 1
	if where != "stdio" {
		if in, err = dial(where); err != nil {
			return err
		}
		out = in
	}
	buf := make([]byte, 128<<10)
	if err := write(out, buf[:1]); err != nil {
		return err
	}
	if mode == "read" {
		if err := readAll(in, buf); err != nil {
			return err
		}
		return write(out, buf[:1])
	}
	for ; n > 0; n -= len(buf) {
		if err := write(out, buf[:min(n, len(buf))]); err != nil {
			return err
		}
	}
	return nil
}

func write(fd int, p []byte) error {
	for len(p) > 0 {
		n, err := call(unix.SYS_WRITE, fd, p)
		if err != nil {
			return fmt.Errorf("write: %w", err)
		}
		p = p[n:]
	}
	return nil
}

func readAll(fd int, buf []byte) error {
	for {
		n, err := call(unix.SYS_READ, fd, buf)
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		if n == 0 {
			return nil
		}
	}
}

func call(trap uintptr, fd int, p []byte) (int, error) {
	for {
		n, _, err := unix.RawSyscall(trap, uintptr(fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)))
		switch err {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, err
		}
	}
}

func dial(port string) (int, error) {
	p, err := strconv.ParseUint(port, 10, 32)
	if err != nil {
		return 0, err
	}
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	return fd, unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: uint32(p)})
}
