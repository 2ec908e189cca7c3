// Package entropy feeds the kernel's random generator.
package entropy

import (
	"encoding/binary"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The ioctls of random(4) (include/uapi/linux/random.h).
const (
	rndAddEntropy = 0x40085203
	rndReseedCRNG = 0x5207
)

// header of struct rand_pool_info: entropy in bits and length in bytes.
const header = 8

// Add mixes seed into the generator, credits it as full entropy and has the
// generator start anew from it, so that two machines that were cloned from
// one memory image part here. It needs CAP_SYS_ADMIN.
func Add(seed []byte) error {
	if len(seed) == 0 {
		return nil
	}
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("add entropy: %w", err)
	}
	defer f.Close()
	info := make([]byte, header, header+len(seed)+3)
	binary.NativeEndian.PutUint32(info[0:], uint32(8*len(seed)))
	binary.NativeEndian.PutUint32(info[4:], uint32(len(seed)))
	info = append(info, seed...)
	if err := ioctl(f, rndAddEntropy, unsafe.Pointer(&info[0])); err != nil {
		return fmt.Errorf("add entropy: %w", err)
	}
	if err := ioctl(f, rndReseedCRNG, nil); err != nil {
		return fmt.Errorf("reseed random generator: %w", err)
	}
	return nil
}

func ioctl(f *os.File, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}
