// Package fsmount performs and undoes mounts below one folder of the guest.
//
// Targets must lie below the root and must not pass through a symbolic link,
// so that nothing that a container writes can redirect a mount of the host's.
// Missing targets are created: a file if the source of a bind is none of a
// directory, a directory otherwise; for an overlay also its upper and work
// directories, if they are below the root. Sources are the host's own business.
//
// Calls may run concurrently; concurrent calls on the same target must not.
package fsmount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
)

// Max bounds the mounts of one call.
const Max = 512

// Mount performs specs in order. On an error those that it made are undone.
func Mount(root string, specs []*api.MountSpec) (err error) {
	if len(specs) > Max {
		return fmt.Errorf("%d mounts: at most %d: %w", len(specs), Max, errdefs.ErrInvalidArgument)
	}
	var made []string
	defer func() {
		if err == nil {
			return
		}
		for _, target := range slices.Backward(made) {
			if uerr := unmount(target); uerr != nil {
				err = errors.Join(err, uerr)
			}
		}
	}()
	for _, s := range specs {
		mounted, err := one(root, s)
		if mounted {
			made = append(made, s.Target)
		}
		if err != nil {
			return fmt.Errorf("mount %s %s on %s: %w", s.Type, s.Source, s.Target, err)
		}
	}
	return nil
}

// one performs a mount. mounted may be true with an error, when the mount was
// made and setting its propagation was not possible.
func one(root string, s *api.MountSpec) (mounted bool, err error) {
	options, propagation, err := splitPropagation(s.Options)
	if err != nil {
		return false, err
	}
	// containerd's package would run a helper program for these.
	if strings.HasPrefix(s.Type, "fuse") {
		return false, fmt.Errorf("type %q: %w", s.Type, errdefs.ErrNotImplemented)
	}
	file, err := wantsFile(s)
	if err != nil {
		return false, err
	}
	if err := create(root, s.Target, file); err != nil {
		return false, err
	}
	for _, dir := range overlayDirs(root, s) {
		if err := create(root, dir, false); err != nil {
			return false, err
		}
	}
	m := mount.Mount{Type: s.Type, Source: s.Source, Options: options}
	if isBind(s) {
		m.Type = "" // the kernel ignores it; an OCI spec says "bind" or "none"
	}
	if err := m.Mount(s.Target); err != nil {
		return false, err
	}
	for _, flag := range propagation {
		if err := unix.Mount("", s.Target, "", flag, ""); err != nil {
			return true, fmt.Errorf("set propagation: %w", err)
		}
	}
	return true, nil
}

func isBind(s *api.MountSpec) bool {
	return slices.Contains(s.Options, "bind") || slices.Contains(s.Options, "rbind")
}

// propagations are the options that mount(8) turns into calls of their own.
var propagations = map[string]uintptr{
	"private":     unix.MS_PRIVATE,
	"rprivate":    unix.MS_PRIVATE | unix.MS_REC,
	"shared":      unix.MS_SHARED,
	"rshared":     unix.MS_SHARED | unix.MS_REC,
	"slave":       unix.MS_SLAVE,
	"rslave":      unix.MS_SLAVE | unix.MS_REC,
	"unbindable":  unix.MS_UNBINDABLE,
	"runbindable": unix.MS_UNBINDABLE | unix.MS_REC,
}

func splitPropagation(options []string) (rest []string, flags []uintptr, err error) {
	for _, o := range options {
		flag, ok := propagations[o]
		switch {
		case ok:
			flags = append(flags, flag)
		case strings.ContainsRune(o, 0):
			return nil, nil, fmt.Errorf("option %q: %w", o, errdefs.ErrInvalidArgument)
		default:
			rest = append(rest, o)
		}
	}
	return rest, flags, nil
}

// relative returns target's path below root.
func relative(root, target string) (string, error) {
	rel, ok := strings.CutPrefix(target, root+"/")
	if !ok || rel == "" || filepath.Clean(target) != target {
		return "", fmt.Errorf("target %q: want a clean path below %s: %w", target, root, errdefs.ErrInvalidArgument)
	}
	return rel, nil
}

// overlayDirs returns the folders below root that an overlay writes to.
func overlayDirs(root string, s *api.MountSpec) (dirs []string) {
	if s.Type != "overlay" {
		return nil
	}
	for _, o := range s.Options {
		key, dir, _ := strings.Cut(o, "=")
		if (key == "upperdir" || key == "workdir") && strings.HasPrefix(dir, root+"/") {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// create makes what is missing of a path below root and checks that no
// symbolic link leads elsewhere.
func create(root, path string, file bool) error {
	rel, err := relative(root, path)
	if err != nil {
		return err
	}
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: root, Err: err}
	}
	defer func() { unix.Close(dir) }()
	parts := strings.Split(rel, "/")
	for i, part := range parts {
		next, err := step(dir, part, file && i == len(parts)-1)
		if err != nil {
			return &os.PathError{Op: "create", Path: filepath.Join(root, filepath.Join(parts[:i+1]...)), Err: err}
		}
		unix.Close(dir)
		dir = next
	}
	return nil
}

// step opens name in dir, creating it first if it is missing.
func step(dir int, name string, file bool) (int, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_BENEATH,
	}
	fd, err := unix.Openat2(dir, name, &how)
	if err != unix.ENOENT {
		return fd, err
	}
	if file {
		err = unix.Mknodat(dir, name, unix.S_IFREG|0o644, 0)
	} else {
		err = unix.Mkdirat(dir, name, 0o755)
	}
	if err != nil && err != unix.EEXIST {
		return -1, err
	}
	return unix.Openat2(dir, name, &how)
}

// wantsFile reports whether the target is a file: that of binding a file.
func wantsFile(s *api.MountSpec) (bool, error) {
	if !isBind(s) {
		return false, nil
	}
	st, err := os.Stat(s.Source)
	if err != nil {
		return false, err
	}
	return !st.IsDir(), nil
}

// Unmount undoes mounts in order. What is not mounted, or not there, is none.
func Unmount(root string, targets []string) error {
	if len(targets) > Max {
		return fmt.Errorf("%d unmounts: at most %d: %w", len(targets), Max, errdefs.ErrInvalidArgument)
	}
	var errs []error
	for _, target := range targets {
		err := checkPath(root, target)
		if err == nil {
			err = unmount(target)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// checkPath refuses a target that is not below root or whose path has a
// symbolic link in it. One that does not exist passes.
func checkPath(root, target string) error {
	rel, err := relative(root, target)
	if err != nil {
		return err
	}
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: root, Err: err}
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, rel, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_BENEATH,
	})
	switch err {
	case nil:
		return unix.Close(fd)
	case unix.ENOENT:
		return nil
	}
	return &os.PathError{Op: "resolve", Path: target, Err: err}
}

func unmount(target string) error {
	err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
	if err == nil || err == unix.EINVAL || err == unix.ENOENT {
		return nil
	}
	return &os.PathError{Op: "unmount", Path: target, Err: err}
}
