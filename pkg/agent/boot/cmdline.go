package boot

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/idmap"
)

// cmdlineDebug is the kernel argument that makes the agent report its boot
// phases and log at debug level.
const cmdlineDebug = "vmrt.debug"

// Cmdline is what the kernel command line tells the agent.
type Cmdline struct {
	// Port is the host's vsock port for the handshake.
	Port uint32
	// Debug asks for boot phases and debug logging on the console.
	Debug bool
	// IDs are those of the pod's user namespace; zero for none.
	IDs idmap.Mapping
}

// ReadCmdline reads /proc/cmdline.
func ReadCmdline() (Cmdline, error) {
	var b [4096]byte // COMMAND_LINE_SIZE is 2048 on x86
	n, err := readFile("/proc/cmdline", b[:])
	if err != nil {
		return Cmdline{}, err
	}
	return parseCmdline(string(b[:n]))
}

func parseCmdline(s string) (Cmdline, error) {
	c := Cmdline{Port: api.HostPort}
	for _, arg := range strings.Fields(s) {
		key, value, _ := strings.Cut(arg, "=")
		switch key {
		case api.CmdlinePort:
			n, err := strconv.ParseUint(value, 10, 32)
			if err != nil || n == 0 {
				return c, fmt.Errorf("kernel argument %q: want a vsock port", arg)
			}
			c.Port = uint32(n)
		case api.CmdlineUIDs, api.CmdlineGIDs:
			list, err := idmap.Parse(value)
			if err != nil {
				return c, fmt.Errorf("kernel argument %q: %w", arg, err)
			}
			if key == api.CmdlineUIDs {
				c.IDs.UIDs = list
			} else {
				c.IDs.GIDs = list
			}
		case cmdlineDebug:
			c.Debug = value != "0"
		}
	}
	return c, nil
}
