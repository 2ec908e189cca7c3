//go:build linux

package storage

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// socket returns a unix socket that listens and one that is connected to it.
// Its name exists only while this runs, in the stage: nothing is left on the
// host, and nobody else can connect.
func (s *Share) socket() (listener, connected *os.File, err error) {
	err = s.do(func() error {
		if s.closed {
			return ErrClosed
		}
		listener, connected, err = listenAndConnect(s.stage())
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("make vhost-user socket: %w", err)
	}
	return listener, connected, nil
}

// listenAndConnect names the socket through a descriptor of dir, whose own
// path may be too long for a sockaddr_un.
func listenAndConnect(dir string) (listener, connected *os.File, err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, nil, err
	}
	defer d.Close()
	addr := &unix.SockaddrUnix{Name: fmt.Sprintf("/proc/self/fd/%d/socket", d.Fd())}

	if listener, err = newSocket("virtiofsd listener"); err != nil {
		return nil, nil, err
	}
	if connected, err = newSocket("virtiofsd connection"); err != nil {
		listener.Close()
		return nil, nil, err
	}
	if err = connect(listener, connected, addr); err != nil {
		listener.Close()
		connected.Close()
	}
	_ = os.Remove(filepath.Join(dir, "socket"))
	return listener, connected, err
}

func newSocket(name string) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// connect returns at once: the kernel completes the connection for accept(2).
func connect(listener, connected *os.File, addr unix.Sockaddr) error {
	if err := unix.Bind(int(listener.Fd()), addr); err != nil {
		return os.NewSyscallError("bind", err)
	}
	if err := unix.Listen(int(listener.Fd()), 1); err != nil {
		return os.NewSyscallError("listen", err)
	}
	if err := unix.Connect(int(connected.Fd()), addr); err != nil {
		return os.NewSyscallError("connect", err)
	}
	return nil
}
