// Command demo starts a private containerd, makes an image, runs a container
// of it in a virtual machine, shows the kernels of the host and of the
// container side by side, and takes everything down again. The programs of
// this project must stand in bin/.
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
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/vmrt/vmrt/hack/tools"
	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
)

// facts is a script that prints one line for each of labels, on the host as
// within the container.
const facts = `uname -r
uname -v | cut -c1-40
grep -c ^processor /proc/cpuinfo
awk '/^MemTotal/ { printf "%d MiB\n", $2 / 1024 }' /proc/meminfo
awk '{ printf "%d s\n", $1 }' /proc/uptime`

var labels = []string{"kernel", "built", "CPUs", "memory", "up for"}

func main() {
	runtime := flag.String("runtime", "io.containerd.vmrt.v2", "containerd `runtime`")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *runtime); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, runtime string) (err error) {
	root, err := tools.Root()
	if err != nil {
		return err
	}
	cfg := env.Config{
		Containerd: "lean", BinDirs: []string{filepath.Join(root, "bin")}, Progress: os.Stderr,
		// Of the machine nothing is known: it may emulate, and be busy.
		VMRT: "boot_timeout = \"3m\"\n",
	}
	if strings.Contains(runtime, ".runc.") {
		cfg.Containerd, cfg.Tools = "2.4", []string{"runc"}
	}
	e, err := env.Start(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			fmt.Fprintf(os.Stderr, "\nEnd of containerd's log:\n%s\n", e.LogTail(20))
		}
		err = errors.Join(err, e.Stop())
	}()
	fmt.Println("containerd runs, with namespaces and a folder of its own")
	busybox, err := image.Busybox()
	if err != nil {
		return err
	}
	if err := e.Import(ctx, busybox); err != nil {
		return err
	}
	fmt.Printf("imported %s, made of this machine's busybox\n\n", busybox.Name)
	if err := compare(ctx, e, runtime); err != nil {
		return err
	}
	left, err := e.Leftovers(ctx)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("left behind: %s", strings.Join(left, ", "))
	}
	fmt.Println("\nThe container is gone: no process, mount, cgroup, interface or file of it is left.")
	return nil
}

// compare runs the script on the host and in a container.
func compare(ctx context.Context, e *env.Env, runtime string) error {
	host, err := exec.CommandContext(ctx, "sh", "-c", facts).Output()
	if err != nil {
		return fmt.Errorf("look at the host: %w", err)
	}
	fmt.Printf("$ ctr run --rm --runtime %s %s demo sh -c '…'\n\n", runtime, image.BusyboxName)
	start := time.Now()
	guest, err := e.Ctr(ctx, "run", "--rm", "--runtime", runtime, image.BusyboxName, "demo", "sh", "-c", facts).Run()
	if err != nil {
		return err
	}
	took := time.Since(start)
	left, right := strings.Split(string(host), "\n"), strings.Split(guest, "\n")
	if len(left) <= len(labels) || len(right) <= len(labels) {
		return fmt.Errorf("the container printed %q; want %d lines", guest, len(labels))
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "\tHOST\tCONTAINER")
	for i, label := range labels {
		fmt.Fprintf(w, "%s\t%s\t%s\n", label, left[i], right[i])
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Printf("\nStart to end it took %.1f s.\n", took.Seconds())
	if left[0] == right[0] && !strings.Contains(runtime, ".runc.") {
		return errors.New("the container runs on the host's kernel")
	}
	return nil
}
