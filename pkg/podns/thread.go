//go:build linux

package podns

import (
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// enterNew moves the calling thread into a new mount namespace and into netns,
// or into a new network namespace if netns is nil.
func enterNew(netns *os.File) error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make the pod's mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("cut the pod's mounts off the host's: %w", err)
	}
	// Whatever folder the process was started in stays free.
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("chdir to /: %w", err)
	}
	if netns != nil {
		return joinNet(netns)
	}
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("make the pod's network namespace: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return fmt.Errorf("set the pod's loopback interface up: %w", err)
	}
	return nil
}

// openNet opens the network namespace at path; nil for an empty path.
func openNet(path string) (*os.File, error) {
	if path == "" {
		return nil, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open the pod's network namespace: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return f, nil
}

func joinNet(netns *os.File) error {
	if err := unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("join network namespace %s: %w: %w", netns.Name(), err, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// loopbackUp sets IFF_UP on lo in the calling thread's network namespace
// (netdevice(7), SIOCSIFFLAGS).
func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(s, unix.SIOCGIFFLAGS, r); err != nil {
		return err
	}
	r.SetUint16(r.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, r)
}
