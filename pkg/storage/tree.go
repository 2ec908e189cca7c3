//go:build linux

package storage

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/idmap"
)

// BindOptions are the options of AddBind, under the names that the OCI runtime
// specification gives them. All of them are enforced on the host.
type BindOptions struct {
	// Recursive takes the mounts below the source along (rbind).
	Recursive bool
	// ReadOnly makes the mount at the source read-only (ro), those below it
	// not.
	ReadOnly bool
	// ReadOnlyRecursive makes all of them read-only (rro).
	ReadOnlyRecursive bool
	// Slave lets what the host mounts and unmounts below the source later
	// appear and disappear (rslave, rshared).
	Slave bool
	// Memory says that the source, if it is a folder, is for shared memory:
	// this pod alone may use it so until its share is closed.
	// Another pod gets ErrMemoryInUse.
	Memory bool
	// IDs, unless zero, are mapped: see guestspec.Bind.
	IDs idmap.Mapping
	// RecursiveIDs maps them on the mounts below the source too.
	RecursiveIDs bool
	// userns is the user namespace of IDs, if there is one already.
	userns *os.File
}

// tree is a detached copy of a mount of the host, or of a part of it.
type tree struct {
	fd      int
	mode    os.FileMode
	options BindOptions
	// unset says that the options do not hold yet, for want of
	// mount_setattr(2). Until then the copy is a peer of the host's mounts:
	// what is mounted or unmounted in it is so on the host.
	unset bool
}

// openTree copies what is at path in the calling thread's mount namespace:
// the mount alone or with all below it. legacy avoids mount_setattr(2).
func openTree(path string, o BindOptions, legacy bool) (*tree, error) {
	// First by itself, for the error that runc has.
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if o.Recursive {
		flags |= unix.AT_RECURSIVE
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, flags)
	if err != nil {
		return nil, &os.PathError{Op: "open_tree", Path: path, Err: err}
	}
	t := &tree{fd: fd, mode: fi.Mode(), options: o, unset: legacy}
	if !legacy {
		err = o.set(fd)
		t.unset = errors.Is(err, unix.ENOSYS)
	}
	switch {
	case t.unset && o.ReadOnlyRecursive:
		err = fmt.Errorf("recursively read-only mount needs mount_setattr, Linux 5.12: %w", errors.ErrUnsupported)
	case t.unset && !o.IDs.IsZero():
		err = fmt.Errorf("id-mapped mount needs mount_setattr, Linux 5.12: %w", errors.ErrUnsupported)
	}
	if err != nil && !errors.Is(err, unix.ENOSYS) {
		t.close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return t, nil
}

func (t *tree) close() { unix.Close(t.fd) }

// attach mounts t at target, which t reaches only once its options hold.
func (s *Share) attach(t *tree, target string) error {
	if !t.unset {
		return t.move(target)
	}
	stage := s.stage("file")
	if t.mode.IsDir() {
		stage = s.stage("dir")
	}
	if err := t.move(stage); err != nil {
		return err
	}
	if err := t.options.setPropagation(stage); err != nil {
		// It stays, out of the guest's sight: to unmount it would unmount
		// the host's.
		return err
	}
	err := t.options.setByRemount(stage)
	if err == nil {
		err = move(stage, target)
	}
	if err != nil {
		_ = unmount(stage)
	}
	return err
}

// move mounts t, as it is, at target.
func (t *tree) move(target string) error {
	if err := unix.MoveMount(t.fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "move_mount", Path: target, Err: err}
	}
	return nil
}

// move moves the mount at from, whose parent is not shared, to target.
func move(from, target string) error {
	if err := unix.MoveMount(unix.AT_FDCWD, from, unix.AT_FDCWD, target, 0); err != nil {
		return &os.PathError{Op: "move_mount", Path: target, Err: err}
	}
	return nil
}

func (o BindOptions) propagation() uint64 {
	if o.Slave {
		return unix.MS_SLAVE
	}
	return unix.MS_PRIVATE
}

// set gives the detached mounts at fd their options by mount_setattr(2). Device
// files and set-user-id bits of the guest's files are nothing to the host.
func (o BindOptions) set(fd int) error {
	all := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID, Propagation: o.propagation()}
	if o.ReadOnlyRecursive {
		all.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &all); err != nil {
		return fmt.Errorf("mount_setattr: %w", err)
	}
	if o.ReadOnly && !o.ReadOnlyRecursive {
		ro := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &ro); err != nil {
			return fmt.Errorf("mount_setattr read-only: %w", err)
		}
	}
	switch {
	case o.IDs.IsZero():
		return nil
	case o.userns != nil:
		return mapIDs(fd, o.userns, o.RecursiveIDs)
	}
	userns, err := newUserNamespace(o.IDs)
	if err != nil {
		return err
	}
	defer userns.Close()
	return mapIDs(fd, userns, o.RecursiveIDs)
}

// newUserNamespace makes one for id-mapped mounts, which lives as long as the
// file. It takes a process.
func newUserNamespace(ids idmap.Mapping) (*os.File, error) {
	f, err := mount.GetUsernsFD(idmap.Format(ids.UIDs), idmap.Format(ids.GIDs))
	if err != nil {
		return nil, fmt.Errorf("make user namespace of an id-mapped mount: %w", err)
	}
	return f, nil
}

// MapsIDs reports whether the host's kernel has id-mapped mounts, which came
// with mount_setattr(2). Not every file system can be mounted so.
func MapsIDs() bool {
	return unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH, &unix.MountAttr{}) != unix.ENOSYS
}

// mapIDs makes the detached mount at fd, or all mounts there, id-mapped ones
// (can_idmap_mount in fs/namespace.c has the errors).
func mapIDs(fd int, userns *os.File, recursive bool) error {
	flags, what := uint(unix.AT_EMPTY_PATH), "the file system"
	if recursive {
		flags, what = flags|unix.AT_RECURSIVE, "the file system, or one that is mounted below,"
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userns.Fd())}
	err := unix.MountSetattr(fd, "", flags, &attr)
	switch err {
	case nil:
		return nil
	case unix.EINVAL:
		return fmt.Errorf("id-mapped mount: %s cannot be mounted so: %w", what, err)
	case unix.EPERM:
		return fmt.Errorf("id-mapped mount: %s is mounted so already: %w", what, err)
	}
	return fmt.Errorf("id-mapped mount: mount_setattr: %w", err)
}

// setPropagation and setByRemount do for the mount at path what set does, by
// mount(2), which sets the flags of one mount at a time.
func (o BindOptions) setPropagation(path string) error {
	if err := unix.Mount("", path, "", uintptr(o.propagation())|unix.MS_REC, ""); err != nil {
		return &os.PathError{Op: "set propagation of", Path: path, Err: err}
	}
	return nil
}

func (o BindOptions) setByRemount(path string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	// A remount sets all flags but those for access times. statfs(2) has the
	// values of mount(2) for these.
	const keep = unix.MS_RDONLY | unix.MS_NOEXEC
	flags := uintptr(st.Flags)&keep | unix.MS_REMOUNT | unix.MS_BIND | unix.MS_NODEV | unix.MS_NOSUID
	if o.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	if err := unix.Mount("", path, "", flags, ""); err != nil {
		return &os.PathError{Op: "remount", Path: path, Err: err}
	}
	return nil
}
