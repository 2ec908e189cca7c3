//go:build linux

package anchor

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// enterRoot makes root, with binds, the root of the calling thread's mount
// namespace and detaches everything else. The processes in the namespace whose
// root and working directory are its old root move along (pivot_root(2)).
func enterRoot(root string, binds []Bind) error {
	// The namespace is a copy of the pod's, and a peer of it where that is
	// shared: nothing that follows may reach it.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	top, err := clone(root)
	if err != nil {
		return err
	}
	defer unix.Close(top)
	if err := unix.MoveMount(top, "", unix.AT_FDCWD, root, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "mount root on", Path: root, Err: err}
	}
	for _, b := range binds {
		if err := bind(top, b); err != nil {
			return err
		}
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

// clone returns a detached copy of what is mounted at path, with everything
// below it.
func clone(path string) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return -1, &os.PathError{Op: "open_tree", Path: path, Err: err}
	}
	return fd, nil
}

// bind mounts b below root. A target that is not there, cannot be resolved
// inside root, or is of another kind than the source is no error.
func bind(root int, b Bind) error {
	target, err := unix.Openat2(root, b.Target, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil // the container's files decide
	}
	defer unix.Close(target)
	source, err := clone(b.Source)
	if err != nil {
		return err
	}
	defer unix.Close(source)
	fits, err := fits(source, target, root)
	if err != nil || !fits {
		return err
	}
	err = unix.MoveMount(source, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	if errors.Is(err, unix.ENOENT) {
		return nil // removed by the container just now
	}
	if err != nil {
		return &os.PathError{Op: "mount volume on", Path: b.Target, Err: err}
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
