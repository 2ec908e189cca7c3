package shim

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// unmapOwnFile lets go of what this process has mapped of its program's file.
// Much of that served the start alone, and is charged to a shim that is alone
// on its host; what runs again is mapped again, from the page cache.
func unmapOwnFile() error {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return err
	}
	defer f.Close()
	mappings, err := cleanMappings(f, exe)
	if err != nil {
		return fmt.Errorf("/proc/self/smaps: %w", err)
	}
	for _, m := range mappings {
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED); errno != 0 {
			return fmt.Errorf("madvise of %x-%x: %w", m.start, m.end, errno)
		}
	}
	return nil
}

// mapping is a range of addresses.
type mapping struct{ start, end uintptr }

// cleanMappings returns the mappings of a file that hold nothing but what the
// file does, and cannot be written to: a position-independent program's
// relocated data is read-only, too, and would be lost. smaps is in the format
// of proc_pid_smaps(5).
func cleanMappings(smaps io.Reader, file string) ([]mapping, error) {
	var all []mapping
	var m mapping
	var mine bool
	s := bufio.NewScanner(smaps)
	for s.Scan() {
		fields := strings.Fields(s.Text())
		switch {
		case len(fields) < 2:
		case strings.HasSuffix(fields[0], ":"):
			if mine && fields[0] == "Anonymous:" && fields[1] == "0" {
				all = append(all, m)
			}
		default:
			if _, err := fmt.Sscanf(fields[0], "%x-%x", &m.start, &m.end); err != nil {
				return nil, fmt.Errorf("line %q: %w", s.Text(), err)
			}
			mine = len(fields) > 5 && strings.Join(fields[5:], " ") == file && !strings.Contains(fields[1], "w")
		}
	}
	return all, s.Err()
}
