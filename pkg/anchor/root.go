//go:build linux

package anchor

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/podns"
)

// enterRoot makes root the root of the calling thread's mount namespace and
// detaches everything else. The processes in the namespace whose root and
// working directory are its old root move along (pivot_root(2)).
func enterRoot(root string) error {
	// The namespace is a copy of the pod's, and a peer of it where that is
	// shared: nothing that follows may reach it.
	if err := makePrivate(); err != nil {
		return err
	}
	top, err := clone(root)
	if err != nil {
		return err
	}
	defer unix.Close(top)
	if err := unix.MoveMount(top, "", unix.AT_FDCWD, root, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "mount root on", Path: root, Err: err}
	}
	if err := unix.Fchdir(top); err != nil {
		return fmt.Errorf("chdir to new root: %w", err)
	}
	// Puts the old root on top of the new one, at "." (pivot_root(2), NOTES).
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach old root: %w", err)
	}
	return nil
}

func makePrivate() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	return nil
}

// clone returns a detached copy of what is mounted at path, with everything
// below it.
func clone(path string) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return -1, &os.PathError{Op: "open_tree", Path: path, Err: err}
	}
	return fd, nil
}

// bind mounts volumes of the pod ns below the root of proc.
func bind(ns *podns.Namespaces, proc *podns.Process, binds []Bind) error {
	if len(binds) == 0 {
		return nil
	}
	var sources []int
	defer func() {
		for _, fd := range sources {
			unix.Close(fd)
		}
	}()
	err := ns.Do(context.Background(), func() error {
		for _, b := range binds {
			fd, err := clone(b.Source)
			if err != nil {
				return err
			}
			sources = append(sources, fd)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return proc.InMounts(func() error {
		root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open root: %w", err)
		}
		defer unix.Close(root)
		for i, b := range binds {
			if err := attach(root, sources[i], b.Target); err != nil {
				return err
			}
			// At once: what is mounted in a peer of a mount of the pod's
			// is mounted in the pod.
			if err := makePrivate(); err != nil {
				return err
			}
		}
		return nil
	})
}

// attach mounts source at the path target below root. A target that is not
// there, cannot be resolved inside root, or does not fit is no error: the
// container's files decide.
func attach(root, source int, path string) error {
	target, err := unix.Openat2(root, path, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil
	}
	defer unix.Close(target)
	fits, err := fits(source, target, root)
	if err != nil || !fits {
		return err
	}
	err = unix.MoveMount(source, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	if errors.Is(err, unix.ENOENT) {
		return nil // removed by the container just now
	}
	if err != nil {
		return &os.PathError{Op: "mount volume on", Path: path, Err: err}
	}
	return nil
}

// fits reports whether source and target are both folders or both not, and
// target is not the root itself, which has to stay in sight.
func fits(source, target, root int) (bool, error) {
	var s, t, r unix.Stat_t
	for fd, st := range map[int]*unix.Stat_t{source: &s, target: &t, root: &r} {
		if err := unix.Fstat(fd, st); err != nil {
			return false, fmt.Errorf("stat: %w", err)
		}
	}
	isRoot := t.Dev == r.Dev && t.Ino == r.Ino
	return !isRoot && s.Mode&unix.S_IFMT == unix.S_IFDIR == (t.Mode&unix.S_IFMT == unix.S_IFDIR), nil
}
