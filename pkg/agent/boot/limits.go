package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// openFiles is the limit that container engines give a container.
const openFiles = 1 << 20

// limits are inherited by containers whose spec names none. They are those of
// a container engine run by systemd: a small machine's defaults, which follow
// from its memory, would be a fraction of them.
var limits = []struct {
	name     string
	resource int
	value    uint64
}{
	{"nofile", unix.RLIMIT_NOFILE, openFiles},
	{"nproc", unix.RLIMIT_NPROC, unix.RLIM_INFINITY},
	{"core", unix.RLIMIT_CORE, unix.RLIM_INFINITY},
	{"sigpending", unix.RLIMIT_SIGPENDING, 1 << 16},
}

func raiseLimits() error {
	var errs []error
	for _, l := range limits {
		if err := unix.Setrlimit(l.resource, &unix.Rlimit{Cur: l.value, Max: l.value}); err != nil {
			errs = append(errs, fmt.Errorf("set limit %s to %d: %w", l.name, l.value, err))
		}
	}
	return errors.Join(errs...)
}

// sysctl is one kernel setting. A missing one belongs to a part that the
// kernel was built without.
type sysctl struct {
	path, value string
	atLeast     bool // keep what the kernel has if that is more
}

// sysctls are what a host with containers has where the kernel's own default
// differs, or follows from the size of the machine.
var sysctls = []sysctl{
	{path: "kernel/pid_max", value: "4194304"},
	{path: "kernel/threads-max", value: "65536", atLeast: true},
	{path: "fs/file-max", value: "9223372036854775807"},
	{path: "fs/inotify/max_user_watches", value: "65536", atLeast: true},
	// A program that reserves more than the machine has works on a large
	// host, and must in a small machine.
	{path: "vm/overcommit_memory", value: "1"},
	{path: "net/ipv4/ping_group_range", value: "0 2147483647"},
}

func setSysctls() error {
	var errs []error
	for _, s := range sysctls {
		if err := s.set("/proc/sys/"); err != nil {
			errs = append(errs, fmt.Errorf("set %s to %s: %w", s.path, s.value, err))
		}
	}
	return errors.Join(errs...)
}

func (s sysctl) set(root string) error {
	path := root + s.path
	if s.atLeast {
		enough, err := s.hasEnough(path)
		if err != nil || enough {
			return missingIsFine(err)
		}
	}
	return missingIsFine(writeFile(path, s.value))
}

func (s sysctl) hasEnough(path string) (bool, error) {
	var b [32]byte
	n, err := readFile(path, b[:])
	if err != nil {
		return false, err
	}
	have, err := strconv.ParseInt(strings.TrimSpace(string(b[:n])), 10, 64)
	if err != nil {
		return false, err
	}
	want, err := strconv.ParseInt(s.value, 10, 64)
	return have >= want, err
}

func missingIsFine(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
