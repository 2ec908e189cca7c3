package shim

import (
	containerdshim "github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"golang.org/x/sys/unix"
)

// listener is the file descriptor of the shim's socket: where `shim start` puts
// it, and containerd's shim library expects it.
const listener = 3

// ownSocket returns the path of the shim's socket, or "". It is for the start:
// containerd's shim library serves a copy of the descriptor and lets the garbage
// collector close this one.
func ownSocket() string {
	addr, err := unix.Getsockname(listener)
	if err != nil {
		return ""
	}
	if a, ok := addr.(*unix.SockaddrUnix); ok {
		return a.Name
	}
	return ""
}

// containerd's shim library finds the services of a shim in its plugin
// registry.
func init() {
	registry.Register(&plugin.Registration{
		Type:     plugins.TTRPCPlugin,
		ID:       "task",
		Requires: []plugin.Type{plugins.EventPlugin, plugins.InternalPlugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			publisher, err := ic.GetByID(plugins.EventPlugin, "publisher")
			if err != nil {
				return nil, err
			}
			sd, err := ic.GetByID(plugins.InternalPlugin, "shutdown")
			if err != nil {
				return nil, err
			}
			return newService(ic.Context, publisher.(containerdshim.Publisher), sd.(shutdown.Service), ownSocket())
		},
	})
}
