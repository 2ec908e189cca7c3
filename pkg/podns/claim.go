//go:build linux

package podns

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Errors of ClaimNet.
var (
	// ErrNetInUse says that a network namespace is that of another pod.
	ErrNetInUse = errors.New("the network namespace is that of another virtual machine, and two virtual machines cannot share one")
	// ErrHostNet says that a network namespace is the host's.
	ErrHostNet = errors.New("the network namespace is the host's, which no pod has for itself")
)

// claimName is an abstract socket address (unix(7)): a network namespace has at
// most one socket of a name, and the kernel forgets it with its process.
const claimName = "@vmrt.pod"

// ClaimNet makes the network namespace that of this pod alone, until Close: a
// second claim of it, by whichever process, is ErrNetInUse. An interface cannot
// serve two virtual machines, and who joins the network of another container
// expects to reach on its loopback address what the other serves there.
// ErrHostNet is returned for the namespace that this process is in.
func (n *Namespaces) ClaimNet() error {
	return n.Do(context.Background(), func() error {
		host, err := sameNet()
		if err != nil {
			return fmt.Errorf("claim network namespace: %w", err)
		}
		if host {
			return ErrHostNet
		}
		f, err := claim()
		if err != nil {
			return err
		}
		if n.claimed != nil {
			n.claimed.Close()
		}
		n.claimed = f
		return nil
	})
}

// sameNet reports whether the calling thread is in the process's own network
// namespace: that of its first thread.
func sameNet() (bool, error) {
	var here, there unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &here); err != nil {
		return false, err
	}
	if err := unix.Stat("/proc/self/ns/net", &there); err != nil {
		return false, err
	}
	return here.Dev == there.Dev && here.Ino == there.Ino, nil
}

func claim() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("claim network namespace: %w", err)
	}
	err = unix.Bind(fd, &unix.SockaddrUnix{Name: claimName})
	if err == nil {
		return os.NewFile(uintptr(fd), claimName), nil
	}
	unix.Close(fd)
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, ErrNetInUse
	}
	return nil, fmt.Errorf("claim network namespace: %w", err)
}
