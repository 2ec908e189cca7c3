// Command lab runs a command in a nested machine that has a real /dev/kvm,
// /dev/vhost-vsock and /dev/vhost-net, on any machine: QEMU emulates a CPU with
// virtualisation (AMD SVM), and a stock Debian kernel on it provides the rest.
//
//	go run ./tests/lab [-timeout 10m] [-out FOLDER] -- COMMAND [ARG...]
//
// The command sees this machine's files, read-only under an overlay that
// forgets, with a cgroup v2 hierarchy, a loopback interface and nothing of the
// network. It runs as root in the same working directory with the same PATH,
// HOME, XDG_CACHE_HOME and VMRT_* variables; TMPDIR is a tmpfs. What it writes
// below the folder of -out comes back, and so do its output and its exit code.
// The exit code is 124 when the time is over and 125 when the lab itself
// fails, or one of the machine's CPUs takes no interrupts any more. Everything
// runs about ten times slower than outside, and a virtual machine inside slower
// still.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"
)

const (
	exitTimeout = 124
	exitLab     = 125
)

func main() {
	// The machine is killed with the thread that started it.
	runtime.LockOSThread()
	timeout := flag.Duration("timeout", 10*time.Minute, "end the machine after this `time`")
	memory := flag.Int("memory", 4096, "memory in `MiB`")
	cpus := flag.Int("cpus", 2, "number of CPUs")
	out := flag.String("out", "", "`folder` that the command may write to")
	verbose := flag.Bool("v", false, "show the machine's console")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: lab [flags] -- COMMAND [ARG...]")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		os.Exit(exitLab)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	m := machine{Memory: *memory, CPUs: *cpus, Out: *out, Command: flag.Args(), Stdout: os.Stdout}
	if *verbose {
		m.Console = os.Stderr
	}
	code, err := m.run(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		fmt.Fprintf(os.Stderr, "lab: the command did not end within %v\n", *timeout)
		code = exitTimeout
	} else if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		code = exitLab
	}
	os.Exit(code)
}
