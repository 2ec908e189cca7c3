//go:build linux

package storage

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrMemoryInUse says that a folder for shared memory is another pod's.
var ErrMemoryInUse = errors.New("it is the shared memory of a container in another virtual machine, and two virtual machines cannot share memory")

// claims are the folders that this pod alone may use as shared memory, by
// inode; touched only in ns.Do.
type claims map[inode]*os.File

type inode struct{ dev, ino uint64 }

// add locks the folder at path, in the pod's mount namespace, for this pod. The
// lock ends with close or with the process. The folder is opened below the
// pod's own mount of it, so the host can unmount what it has.
func (c claims) add(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("claim shared memory: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return fmt.Errorf("claim shared memory: %w", err)
	}
	id := inode{st.Dev, st.Ino}
	if c[id] != nil { // another container of this pod
		return f.Close()
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return ErrMemoryInUse
		}
		return fmt.Errorf("claim shared memory: %w", err)
	}
	c[id] = f
	return nil
}

func (c claims) close() {
	for id, f := range c {
		f.Close()
		delete(c, id)
	}
}
