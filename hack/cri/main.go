// Command cri starts a private containerd in which pods run, as package
// tests/env describes, and runs a command or a shell inside. crictl and ctr are
// in PATH and know where containerd is. The programs of this
// project must stand in bin/ (`make build`). Run it as root:
//
//	go run ./hack/cri                       # a shell; pods run with vmrt
//	go run ./hack/cri -sandboxer shim       # the same through the Sandbox API
//	go run ./hack/cri -runtime runc crictl info
//
// In the shell, $PODS holds pod.json and container.json to begin with:
//
//	crictl pull $BUSYBOX
//	pod=$(crictl runp $PODS/pod.json)
//	ctr=$(crictl create $pod $PODS/container.json $PODS/pod.json)
//	crictl start $ctr; crictl exec $ctr uname -r; crictl logs $ctr
//	crictl rmp -fa
//
// With -critest the images of package tests/env/criimage can be pulled too:
// registry.k8s.io/e2e-test-images/nginx:1.14-2 is a web server.
//
// Everything ends with the shell. VMRT_KEEP=1 keeps the folder with the logs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/vmrt/vmrt/hack/tools"
	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/criimage"
	"github.com/vmrt/vmrt/tests/env/image"
)

func main() {
	var cri env.CRI
	flag.StringVar(&cri.Runtime, "runtime", "vmrt", "runtime `handler` of pods that name none: vmrt or runc")
	flag.StringVar(&cri.Sandboxer, "sandboxer", "podsandbox", "how vmrt's sandboxes are run: podsandbox or shim")
	vmrt := flag.String("config", "", "configuration `file` of vmrt")
	critest := flag.Bool("critest", false, "serve critest's images too")
	flag.Parse()
	args := flag.Args()
	if len(args) == 0 {
		args = []string{"bash", "--norc"}
	}
	err := run(cri, *critest, *vmrt, args)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cri:", err)
		os.Exit(1)
	}
}

func run(cri env.CRI, critest bool, vmrt string, args []string) (err error) {
	ctx := context.Background()
	root, err := tools.Root()
	if err != nil {
		return err
	}
	busybox, err := image.Busybox()
	if err != nil {
		return err
	}
	cri.Images = []image.Image{busybox}
	if critest {
		more, err := criimage.All(ctx)
		if err != nil {
			return err
		}
		cri.Images = append(cri.Images, more...)
	}
	cfg := env.Config{CRI: &cri, BinDirs: []string{filepath.Join(root, "bin")}, Progress: os.Stderr}
	if vmrt != "" {
		b, err := os.ReadFile(vmrt)
		if err != nil {
			return err
		}
		cfg.VMRT = string(b)
	}
	e, err := env.Start(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.Stop()) }()
	pods, err := examples(e.Dir)
	if err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "containerd logs to %s\n", filepath.Join(e.Dir, "containerd.log"))
	// The terminal's signals are for what runs inside.
	signal.Ignore(os.Interrupt, syscall.SIGQUIT)
	defer signal.Reset()
	cmd := e.Command(ctx, args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = nil // its process group is ours: the terminal's
	cmd.Env = append(cmd.Env, "TERM="+os.Getenv("TERM"), "PODS="+pods, "BUSYBOX="+image.BusyboxName,
		"PS1=[vmrt "+cri.Runtime+" "+cri.Sandboxer+"] \\w# ")
	return cmd.Cmd.Run()
}

const pod = `{
  "metadata": {"name": "pod", "namespace": "default", "uid": "pod", "attempt": 1},
  "log_directory": "%s",
  "linux": {}
}
`

const container = `{
  "metadata": {"name": "container", "attempt": 1},
  "image": {"image": "` + image.BusyboxName + `"},
  "command": ["sh", "-c", "echo started; exec sleep 100000"],
  "log_path": "container.log",
  "linux": {}
}
`

// examples writes a pod's and a container's configuration.
func examples(dir string) (string, error) {
	pods := filepath.Join(dir, "pods")
	return pods, errors.Join(
		os.MkdirAll(pods, 0o755),
		os.WriteFile(filepath.Join(pods, "pod.json"), fmt.Appendf(nil, pod, pods), 0o644),
		os.WriteFile(filepath.Join(pods, "container.json"), []byte(container), 0o644),
	)
}
