//go:build linux

package main

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Package variables stay where they are, as the system call needs.
var (
	code = [2]uint64{
		0x1_0000_00b7, // r0 = 1
		0x0000_0095,   // exit
	}
	license = [4]byte{'G', 'P', 'L'}
)

// cgroupBPF loads the program "allow every device" (BPF_PROG_TYPE_CGROUP_DEVICE,
// include/uapi/linux/bpf.h), which is how OCI runtimes rule over devices.
func cgroupBPF() error {
	attr := struct {
		progType, insnCount uint32
		insns, license      uint64
		logLevel, logSize   uint32
		logBuf              uint64
		kernVersion, flags  uint32
	}{
		progType: unix.BPF_PROG_TYPE_CGROUP_DEVICE, insnCount: uint32(len(code)),
		insns: uint64(uintptr(unsafe.Pointer(&code))), license: uint64(uintptr(unsafe.Pointer(&license))),
	}
	fd, errno := uintptr(0), unix.EAGAIN
	// The verifier gives up with EAGAIN for a signal (kernel/bpf/verifier.c), and
	// Go sends its threads some.
	for try := 0; try < 30 && errno == unix.EAGAIN; try++ {
		fd, _, errno = unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	}
	if errno != 0 {
		return fmt.Errorf("load program: %w", errno)
	}
	return unix.Close(int(fd))
}
