package relay

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// refusesBytes reports whether a send on c fails for good. It sends nothing
// and waits for nothing.
func refusesBytes(c syscall.Conn) bool {
	rc, err := c.SyscallConn()
	if err != nil {
		return true // closed
	}
	refused := false
	err = rc.Control(func(fd uintptr) {
		_, err := unix.SendmsgN(int(fd), nil, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		refused = err != nil && err != unix.EAGAIN && err != unix.EINTR
	})
	return err != nil || refused
}
