package state

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// checkNoMount fails when something is mounted at dir or below it in this
// process's mount namespace: what is removed there would be somebody's data.
func checkNoMount(dir string) error {
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real // The kernel lists real paths.
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		// proc_pid_mountinfo(5): the mount point is the fifth field.
		fields := strings.Fields(lines.Text())
		if len(fields) < 5 {
			continue
		}
		if at := unescape(fields[4]); at == dir || strings.HasPrefix(at, dir+"/") {
			return fmt.Errorf("%s is still mounted: %w", at, errdefs.ErrFailedPrecondition)
		}
	}
	return lines.Err()
}

// unescape decodes the kernel's \ooo for blanks and backslashes.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
