// Command containerd-shim-vmrt-v2 is the containerd runtime
// io.containerd.vmrt.v2. containerd starts it; see pkg/shim.
package main

import (
	"context"

	containerdshim "github.com/containerd/containerd/v2/pkg/shim"

	"github.com/vmrt/vmrt/pkg/shim"
)

func main() {
	containerdshim.RunShim(context.Background(), shim.NewManager(), shim.ProcessOptions)
}
