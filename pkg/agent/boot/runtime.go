package boot

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// seals are those by which crun knows memory that nothing can change
// (cloned_binary.c, CRUN_MEMFD_SEALS).
const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// sealRuntime moves the OCI runtime at path into sealed memory, which lasts as
// long as this process, and makes path a link to it. A container can reach the
// runtime's program through /proc/self/exe and must not be able to write it;
// from anywhere else crun therefore copies itself to such memory at each start,
// with two more execs, and what runs then is code in new places, which an
// emulator translates anew. After an error the file is as it was.
func sealRuntime(path string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("seal OCI runtime %s: %w", path, err)
		}
	}()
	src, err := os.Open(path)
	if err != nil {
		return err
	}
	defer src.Close()
	info, err := src.Stat()
	if err != nil {
		return err
	}
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate("crun", flags|unix.MFD_EXEC)
	if err == unix.EINVAL { // Linux before 6.3: all of them can be executed
		fd, err = unix.MemfdCreate("crun", flags)
	}
	if err != nil {
		return fmt.Errorf("memfd_create: %w", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	for left := info.Size(); left > 0; {
		n, err := unix.Sendfile(fd, int(src.Fd()), nil, int(left))
		if err == unix.EINTR {
			continue
		}
		if err == nil && n == 0 {
			err = errors.New("file became shorter")
		}
		if err != nil {
			return fmt.Errorf("copy: %w", err)
		}
		left -= int64(n)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		return fmt.Errorf("add seals: %w", err)
	}
	link := path + ".sealed"
	if err := os.Symlink(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd), link); err != nil {
		return err
	}
	if err := os.Rename(link, path); err != nil {
		os.Remove(link)
		return err
	}
	return nil
}
