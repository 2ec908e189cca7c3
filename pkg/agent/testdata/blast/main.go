// Command blast moves bytes as fast as it can, for benchmarks: it writes to
// stdout or a vsock connection to the host, or reads stdin or such a
// connection to its end.
//
//	blast write|read stdio|PORT BYTES
package main

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

func main() {
	runtime.GOMAXPROCS(2)
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
	in, out := os.Stdin, os.Stdout
	if where != "stdio" {
		if in, err = dial(where); err != nil {
			return err
		}
		out = in
	}
	buf := make([]byte, 128<<10)
	if mode == "read" {
		_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{in}, buf)
		if err == nil && where != "stdio" {
			_, err = out.Write([]byte{1}) // all is here
		}
		return err
	}
	for n > 0 {
		m, err := out.Write(buf[:min(n, len(buf))])
		if err != nil {
			return err
		}
		n -= m
	}
	return nil
}

func dial(port string) (*os.File, error) {
	p, err := strconv.ParseUint(port, 10, 32)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: uint32(p)}); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "vsock"), nil
}
