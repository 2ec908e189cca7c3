package shim

import (
	"bufio"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	resolvConfPath = "/etc/resolv.conf"
	// maxResolvConf is how much of that file is read, in bytes.
	maxResolvConf = 64 << 10
)

// nameServers returns what the file that is mounted at a container's
// /etc/resolv.conf names; nothing if there is none. A container may have
// written the file.
func nameServers(spec *specs.Spec) []netip.Addr {
	for _, m := range spec.Mounts {
		if filepath.Clean(m.Destination) == resolvConfPath && filepath.IsAbs(m.Source) {
			return readNameServers(m.Source)
		}
	}
	return nil
}

// readNameServers reads resolv.conf(5). What cannot be read names none: the
// container will see so for itself.
func readNameServers(path string) (all []netip.Addr) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil
	}
	lines := bufio.NewScanner(io.LimitReader(f, maxResolvConf))
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if addr, err := netip.ParseAddr(fields[1]); err == nil {
			all = append(all, addr)
		}
	}
	return all
}
