package qemu

import (
	"fmt"
	"io/fs"
	"os"
	"slices"
	"syscall"
)

const kvmDevice = "/dev/kvm"

// kvmCredential returns the credential that QEMU needs to open /dev/kvm itself:
// c with the device's group added if the device is open to that. A nil c is the
// caller, whose rights are its own matter.
func kvmCredential(c *syscall.Credential) (*syscall.Credential, error) {
	fi, err := os.Stat(kvmDevice)
	if err != nil {
		return nil, err
	}
	if c == nil || permits(fi, c, 6) {
		return c, nil
	}
	with := *c
	with.Groups = append(slices.Clone(c.Groups), gidOf(fi))
	with.NoSetGroups = false
	if !permits(fi, &with, 6) {
		return nil, fmt.Errorf("open %s as user %d: mode %v, group %d: %w", kvmDevice, c.Uid, fi.Mode().Perm(), gidOf(fi), os.ErrPermission)
	}
	return &with, nil
}

// permits reports whether the mode of a file allows a credential all of want,
// as three permission bits. It knows nothing of access control lists.
func permits(fi fs.FileInfo, c *syscall.Credential, want fs.FileMode) bool {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return false
	}
	bits := fi.Mode().Perm()
	switch {
	case c.Uid == 0:
		return true
	case st.Uid == c.Uid:
		bits >>= 6
	case st.Gid == c.Gid || slices.Contains(c.Groups, st.Gid):
		bits >>= 3
	}
	return bits&want == want
}

func gidOf(fi fs.FileInfo) uint32 {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return st.Gid
	}
	return 0
}
