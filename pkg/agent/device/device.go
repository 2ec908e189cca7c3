// Package device lists the device nodes of the guest.
package device

import (
	"fmt"
	"io/fs"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
)

// Max bounds the list.
const Max = 8192

// List returns the character and block devices below dir, which is /dev,
// sorted by path. Terminals of /dev/pts belong to processes and are left out.
func List(dir string) ([]*api.Device, error) {
	var devices []*api.Device
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil && path == dir:
			return err
		case err != nil: // it went away
			return nil
		case d.IsDir() && path == filepath.Join(dir, "pts"):
			return fs.SkipDir
		case d.Type()&fs.ModeDevice == 0:
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return nil
		}
		if len(devices) == Max {
			return fmt.Errorf("more than %d", Max)
		}
		devices = append(devices, describe(path, info))
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	return devices, nil
}

func describe(path string, info fs.FileInfo) *api.Device {
	st := info.Sys().(*syscall.Stat_t)
	kind := "b"
	if info.Mode()&fs.ModeCharDevice != 0 {
		kind = "c"
	}
	return &api.Device{
		Path:  path,
		Type:  kind,
		Major: int64(unix.Major(st.Rdev)),
		Minor: int64(unix.Minor(st.Rdev)),
		Mode:  uint32(info.Mode().Perm()),
	}
}
