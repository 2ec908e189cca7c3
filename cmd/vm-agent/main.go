// The machine is the agent's alone: no CPU limit of a cgroup to look for.
//
//go:debug containermaxprocs=0

// Command vm-agent is PID 1 of a pod's virtual machine.
package main

import (
	"fmt"
	"os"

	"github.com/vmrt/vmrt/pkg/agent"
	"github.com/vmrt/vmrt/pkg/agent/halt"
	"github.com/vmrt/vmrt/pkg/version"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintf(os.Stderr, "vm-agent %s is PID 1 of a virtual machine and does nothing elsewhere\n", version.Version)
		os.Exit(2)
	}
	err := agent.Run(version.Version)
	fmt.Fprintln(os.Stderr, "vm-agent:", err)
	halt.Now()
}
