package stdio

import (
	"fmt"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// spliceSize is what one splice moves at most.
const spliceSize = 256 << 10

// spliceFrom moves bytes from a connection into a pipe without a copy through
// this program: without hardware virtualisation copies are what limits a
// stream. It returns nil at the connection's end. ok is false, and nothing was
// moved, where the kernel cannot do it.
func spliceFrom(conn, pipe syscall.Conn) (ok bool, err error) {
	src, err := conn.SyscallConn()
	if err != nil {
		return true, err
	}
	dst, err := pipe.SyscallConn()
	if err != nil {
		return true, err
	}
	for {
		n, full, err := spliceOnce(src, dst)
		switch {
		case full:
			if err := awaitRoom(dst); err != nil {
				return true, err
			}
			continue
		case err == unix.EINVAL && !ok:
			return false, nil
		case err != nil:
			return true, err
		case n == 0:
			return true, nil
		}
		ok = true
	}
}

// spliceOnce waits until src has bytes and moves some. full says that the pipe
// has no room for them.
func spliceOnce(src, dst syscall.RawConn) (n int64, full bool, err error) {
	waitErr := src.Read(func(fd uintptr) bool {
		ctlErr := dst.Control(func(pipe uintptr) {
			for {
				n, err = splice(int(fd), int(pipe))
				if err != unix.EAGAIN {
					return
				}
				if full = !writable(int(pipe)); full || !readable(int(fd)) {
					return
				}
				// The pipe was full and is not any more. To wait for bytes
				// would be to wait for ever: they are there.
			}
		})
		if ctlErr != nil {
			err = ctlErr
		}
		return err != unix.EAGAIN || full
	})
	if waitErr != nil {
		return 0, false, waitErr
	}
	return n, full, err
}

// awaitRoom returns when the pipe can be written to, or its reader is gone,
// which the next splice tells.
func awaitRoom(pipe syscall.RawConn) error {
	return pipe.Write(func(fd uintptr) bool { return writable(int(fd)) })
}

// awaitBytes returns when the pipe can be read from, or has ended.
func awaitBytes(pipe syscall.RawConn) error {
	return pipe.Read(func(fd uintptr) bool { return readable(int(fd)) })
}

// spliceOut moves what a pipe holds to a connection, and waits until that takes
// some. n is 0 at the pipe's end. awaitBytes must have returned.
func spliceOut(pipe, conn syscall.RawConn) (n int64, err error) {
	waitErr := conn.Write(func(fd uintptr) bool {
		ctlErr := pipe.Control(func(pipe uintptr) {
			n, err = splice(int(pipe), int(fd))
		})
		if ctlErr != nil {
			err = ctlErr
		}
		return err != unix.EAGAIN
	})
	if waitErr != nil {
		return 0, waitErr
	}
	return n, err
}

// splice moves what it can without waiting for bytes, room or credit.
//
// Go's own system calls have its runtime look every 20 us whether they are done,
// which goes on for a while after they are: under emulation that costs several
// times what the call does. A raw one must not wait, but a pipe is locked while
// the memory of whoever uses it is paged in, from a file that may be the host's
// or a file system of the container's own. Our kernel tells then.
func splice(from, to int) (n int64, err error) {
	const flags = unix.SPLICE_F_NONBLOCK | unix.SPLICE_F_MOVE
	for {
		err = unix.EBUSY
		if canTryLock() {
			n, err = rawSplice(from, to, flags|spliceTryLock)
		}
		if err == unix.EBUSY {
			n, err = unix.Splice(from, nil, to, nil, spliceSize, flags)
		}
		if err != unix.EINTR {
			return n, err
		}
	}
}

func rawSplice(from, to, flags int) (int64, error) {
	n, _, errno := unix.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, spliceSize, uintptr(flags))
	if errno != 0 {
		return 0, errno
	}
	return int64(n), nil
}

// spliceTryLock is SPLICE_F_TRYLOCK of the tuned kernel (guest/patches): EBUSY
// if the pipe is locked.
const spliceTryLock = 0x10

// canTryLock reports whether the kernel knows spliceTryLock.
var canTryLock = sync.OnceValue(func() bool {
	var pipe [2]int
	if unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		return false
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	socket, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer unix.Close(socket[0])
	defer unix.Close(socket[1])
	// An empty pipe, or else a flag that no other kernel has.
	_, err = rawSplice(pipe[0], socket[0], unix.SPLICE_F_NONBLOCK|spliceTryLock)
	return err == unix.EAGAIN
})

// canSpliceOut reports whether the kernel sends many pages of a pipe in one
// packet, as Linux does since 6.5 (net: splice_to_socket). Before that each page
// is a packet of its own, which costs more than the copy.
var canSpliceOut = sync.OnceValue(func() bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	var major, minor int
	n, _ := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	return n == 2 && (major > 6 || major == 6 && minor >= 5)
})

// readable reports whether a read from fd would not have to wait.
func readable(fd int) bool { return ready(fd, unix.POLLIN) }

// writable reports whether a write to fd would not have to wait.
func writable(fd int) bool { return ready(fd, unix.POLLOUT) }

// ready polls without waiting, hence by a raw system call (see splice).
func ready(fd int, events int16) bool {
	p := unix.PollFd{Fd: int32(fd), Events: events}
	var now unix.Timespec
	for {
		n, _, err := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), 1, uintptr(unsafe.Pointer(&now)), 0, 0, 0)
		if err != unix.EINTR {
			return err != 0 || n > 0
		}
	}
}
