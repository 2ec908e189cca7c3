package fsmount

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// DetachBelow unmounts everything on or below path, last mount first, even
// what is still in use.
func DetachBelow(path string) error {
	points, err := below(path)
	if err != nil {
		return err
	}
	var errs []error
	for _, point := range slices.Backward(points) {
		err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && err != unix.EINVAL && err != unix.ENOENT {
			errs = append(errs, &os.PathError{Op: "unmount", Path: point, Err: err})
		}
	}
	return errors.Join(errs...)
}

// RemoveAll removes a folder after what is mounted below it was detached. It
// refuses while anything still is: removing would reach into that.
func RemoveAll(path string) error {
	detachErr := DetachBelow(path)
	left, err := below(path)
	if err != nil {
		return errors.Join(detachErr, err)
	}
	if len(left) > 0 {
		return errors.Join(detachErr, fmt.Errorf("remove %s: %s is still mounted: %w", path, left[0], unix.EBUSY))
	}
	return os.RemoveAll(path)
}

// below lists the mount points on or below path in the order of mounting.
func below(path string) ([]string, error) {
	infos, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		return i.Mountpoint != path && !strings.HasPrefix(i.Mountpoint, path+"/"), false
	})
	if err != nil {
		return nil, fmt.Errorf("list mounts below %s: %w", path, err)
	}
	points := make([]string, len(infos))
	for i, info := range infos {
		points[i] = info.Mountpoint
	}
	return points, nil
}
