// Mkguest makes a folder of guest files: kernel, initramfs and manifest.
package main

import (
	"flag"
	"fmt"
	"os"

	"github.com/vmrt/vmrt/guest/assets"
	"github.com/vmrt/vmrt/pkg/version"
)

func main() {
	s := assets.Spec{}
	flag.StringVar(&s.Kind, "kind", "", "kind of `kernel`: tuned or stock")
	flag.StringVar(&s.KernelDir, "kernel", "", "`folder` with vmlinux, release, version and lib/modules")
	flag.StringVar(&s.Agent, "agent", "", "vm-agent `program`, statically linked")
	flag.StringVar(&s.AgentVersion, "agent-version", version.Version, "the agent's `version`, for the manifest")
	flag.StringVar(&s.Runtime, "runtime", "", "OCI runtime `program`, statically linked")
	flag.StringVar(&s.RuntimeVersion, "runtime-version", "crun", "its name and `version`, for the manifest")
	flag.StringVar(&s.Out, "out", "", "`folder` to write")
	flag.Parse()
	if flag.NArg() != 0 || s.KernelDir == "" || s.Agent == "" || s.Runtime == "" || s.Out == "" {
		flag.Usage()
		os.Exit(2)
	}
	m, err := assets.Build(s)
	if err != nil {
		fmt.Fprintln(os.Stderr, "mkguest:", err)
		os.Exit(1)
	}
	fmt.Printf("%s: %s, initramfs %.1f MB with %d modules\n",
		s.Out, m, float64(m.Initramfs.Bytes)/1e6, m.Initramfs.Modules)
}
