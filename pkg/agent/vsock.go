package agent

import (
	"fmt"
	"net"
	"os"
	"time"

	"github.com/containerd/log"
	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// Until the host was told, sockets are bare descriptors: without hardware
// virtualisation the first run of every piece of code costs, and Go's network
// poller is a large one.

const (
	// dialTimeout bounds the attempts to reach the host.
	dialTimeout = 20 * time.Second
	// dialRetry is the pause between two of them.
	dialRetry = 5 * time.Millisecond
)

// socket returns a vsock socket in blocking mode.
func socket() (int, error) {
	return unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
}

// listen opens ports. They accept connections whatever the machine's own
// context id is, which is another one after a restore.
func listen(ports ...uint32) (fds []int, err error) {
	defer func() {
		if err != nil {
			for _, fd := range fds {
				unix.Close(fd)
			}
		}
	}()
	for _, port := range ports {
		fd, err := socket()
		if err != nil {
			return fds, fmt.Errorf("listen at vsock port %d: %w", port, err)
		}
		fds = append(fds, fd)
		if err := unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port}); err != nil {
			return fds, fmt.Errorf("bind vsock port %d: %w", port, err)
		}
		if err := unix.Listen(fd, unix.SOMAXCONN); err != nil {
			return fds, fmt.Errorf("listen at vsock port %d: %w", port, err)
		}
	}
	return fds, nil
}

// accepting makes listeners of what listen returned, which it takes over.
func accepting(fds []int) ([]net.Listener, error) {
	var all []net.Listener
	for _, fd := range fds {
		f := os.NewFile(uintptr(fd), "vsock")
		l, err := vsock.FileListener(f) // a copy
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("accept at vsock: %w", err)
		}
		all = append(all, hostOnly{l})
	}
	return all, nil
}

// hostOnly is a listener that drops connections of anybody but the host.
type hostOnly struct{ *vsock.Listener }

func (l hostOnly) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if a, ok := c.RemoteAddr().(*vsock.Addr); ok && a.ContextID == vsock.Host {
			return c, nil
		}
		log.L.Warnf("connection of %v dropped", c.RemoteAddr())
		c.Close()
	}
}

// dialHost connects to the host's port. The device may still be starting, so
// it tries for a while. An attempt that the host has not answered is not given
// up meanwhile, as the kernel does after two seconds unless it is told
// otherwise (VSOCK_DEFAULT_CONNECT_TIMEOUT, net/vmw_vsock/af_vsock.c): a host
// that is late has accepted it and would find it dead.
func dialHost(port uint32) (int, error) {
	for deadline := time.Now().Add(dialTimeout); ; time.Sleep(dialRetry) {
		fd, err := socket()
		if err != nil {
			return -1, fmt.Errorf("dial the host: %w", err)
		}
		patience := unix.NsecToTimeval(max(time.Until(deadline), dialRetry).Nanoseconds())
		err = unix.SetsockoptTimeval(fd, unix.AF_VSOCK, unix.SO_VM_SOCKETS_CONNECT_TIMEOUT, &patience)
		if err == nil {
			err = unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: port})
		}
		if err == nil {
			return fd, nil
		}
		unix.Close(fd)
		if time.Now().After(deadline) {
			return -1, fmt.Errorf("dial the host at port %d: %w", port, err)
		}
	}
}

// pollable makes a file of a socket, which it takes over, that can have
// deadlines.
func pollable(fd int) (*os.File, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, fmt.Errorf("set vsock non-blocking: %w", err)
	}
	return os.NewFile(uintptr(fd), "vsock"), nil
}
