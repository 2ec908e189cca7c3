package main

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vmrt/vmrt/guest/initramfs"
	"github.com/vmrt/vmrt/guest/kmod"
	"github.com/vmrt/vmrt/hack/tools"
	"github.com/vmrt/vmrt/pkg/hypervisor/hostcpu"
)

//go:embed init.sh
var initScript []byte

// modules are what the nested machine needs; kmod adds what they depend on.
var modules = []string{
	"crc32c_generic", "virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "kvm_amd", "vhost_vsock", "vhost_net", "tun",
	"veth", "bridge", "sch_ingress", "cls_u32", "act_mirred", "erofs", "loop", "fuse",
}

// machine is one nested machine.
type machine struct {
	Memory  int // MiB
	CPUs    int
	Out     string // a folder, or empty
	Command []string
	Stdout  io.Writer
	Console io.Writer // nil drops the console unless the machine fails
}

// run boots the machine and returns the command's exit code.
func (m *machine) run(ctx context.Context) (code int, err error) {
	dir, err := os.MkdirTemp("", "vmrt-lab-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	kernel, err := fetchKernel(ctx)
	if err != nil {
		return 0, err
	}
	initrd := filepath.Join(dir, "initrd")
	if err := m.writeInitrd(initrd, filepath.Join(kernel, "modules")); err != nil {
		return 0, fmt.Errorf("make the nested machine's initramfs: %w", err)
	}
	status := filepath.Join(dir, "status")
	args, err := m.args(filepath.Join(kernel, "vmlinuz"), initrd, status)
	if err != nil {
		return 0, err
	}
	pulse, beats, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer pulse.Close()
	defer beats.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		if err := watch(pulse, dead); err != nil {
			cancel(err)
		}
	}()
	var console bytes.Buffer
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	cmd.Stdout = struct{ io.Writer }{m.Stdout} // a pipe, which QEMU can open by name
	cmd.Stderr = &console
	if m.Console != nil {
		cmd.Stderr = io.MultiWriter(&console, m.Console)
	}
	cmd.ExtraFiles = []*os.File{beats} // descriptor 3
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 10 * time.Second
	err = cmd.Run()
	if ctx.Err() != nil {
		return 0, fmt.Errorf("%w; end of its console:\n%s", context.Cause(ctx), lastLines(console.String(), 20))
	}
	if err != nil {
		return 0, fmt.Errorf("run the nested machine: %w:\n%s", err, lastLines(console.String(), 20))
	}
	b, err := os.ReadFile(status)
	if err != nil {
		return 0, err
	}
	code, err = strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0, fmt.Errorf("the nested machine ended before the command (status %q); end of its console:\n%s",
			b, lastLines(console.String(), 20))
	}
	return code, nil
}

// args is QEMU's command line. Output is port 1 on stdout, the exit code
// port 2 in a file, the pulse of the CPUs port 3 on descriptor 3, the console
// stderr.
func (m *machine) args(kernel, initrd, status string) ([]string, error) {
	// Calibration against an emulated timer is slow and at times hangs.
	khz, err := hostcpu.TSCKHz()
	if err != nil {
		return nil, err
	}
	// The counter is the outer machine's, hence the same on each CPU, which the
	// kernel does not believe unless told. A KVM on another clock gives its
	// guests no stable kvm-clock and no PTP.
	cmdline := fmt.Sprintf("console=ttyS0 quiet reboot=t panic=-1 mitigations=off tsc=reliable tsc_early_khz=%d", khz)
	args := []string{
		"-name", "vmrt-lab", "-M", "q35,accel=tcg,smm=off", "-cpu", "max", "-smp", strconv.Itoa(m.CPUs),
		"-m", strconv.Itoa(m.Memory), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-kernel", kernel, "-initrd", initrd, "-append", cmdline,
		"-chardev", "file,id=console,path=/dev/stderr", "-serial", "chardev:console",
		"-device", "virtio-serial-pci",
		// Not a stdio chardev: its port closes when standard input ends.
		"-chardev", "file,id=output,path=/dev/stdout", "-device", "virtserialport,nr=1,chardev=output",
		"-chardev", "file,id=status,path=" + status, "-device", "virtserialport,nr=2,chardev=status",
		"-chardev", "file,id=pulse,path=/dev/fd/3", "-device", "virtserialport,nr=3,chardev=pulse",
		"-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
		"-device", "virtio-9p-pci,fsdev=root,mount_tag=root",
	}
	if m.Out != "" {
		args = append(args, "-fsdev", "local,id=out,path="+m.Out+",security_model=none,multidevs=remap",
			"-device", "virtio-9p-pci,fsdev=out,mount_tag=out")
	}
	return args, nil
}

// fetchKernel returns the folder with the machine's kernel.
func fetchKernel(ctx context.Context) (string, error) {
	root, err := tools.Root()
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(root, "tests/lab/kernel.sh"))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("fetch the nested machine's kernel: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// writeInitrd packs busybox, the modules, the init script and the command.
func (m *machine) writeInitrd(path, moduleDir string) (err error) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return err
	}
	program, err := os.ReadFile(busybox)
	if err != nil {
		return err
	}
	command, err := m.commandScript()
	if err != nil {
		return err
	}
	if m.Out != "" {
		if m.Out, err = filepath.Abs(m.Out); err != nil {
			return err
		}
	}
	var a initramfs.Archive
	var errs []error
	for _, d := range []string{"proc", "sys", "dev", "lower", "upper", "root"} {
		errs = append(errs, a.Dir(d, 0o755))
	}
	errs = append(errs,
		a.File("init", 0o755, initScript),
		a.File("bin/busybox", 0o755, program),
		a.File("command", 0o644, command),
		a.File("out", 0o644, []byte(m.Out)),
		addModules(&a, moduleDir))
	if err := errors.Join(errs...); err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = a.WriteTo(f)
	return errors.Join(err, f.Close())
}

// addModules adds the modules that the kernel has, and the order in which they
// are to be loaded.
func addModules(a *initramfs.Archive, dir string) error {
	tree, err := kmod.Open(dir)
	if err != nil {
		return err
	}
	list, err := tree.Resolve(modules)
	if err != nil {
		return err
	}
	var order strings.Builder
	for _, mod := range list {
		if err := a.File("modules/"+mod.Name+".ko", 0o644, mod.Data); err != nil {
			return err
		}
		fmt.Fprintln(&order, mod.Name+".ko")
	}
	return a.File("modules/order", 0o644, []byte(order.String()))
}

// commandScript is a shell script that becomes the command.
func (m *machine) commandScript() ([]byte, error) {
	wd, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	var s strings.Builder
	for _, kv := range os.Environ() {
		name, value, _ := strings.Cut(kv, "=")
		switch {
		case name == "PATH", name == "HOME", name == "XDG_CACHE_HOME", strings.HasPrefix(name, "VMRT_"):
			fmt.Fprintf(&s, "export %s=%s\n", name, quote(value))
		}
	}
	fmt.Fprintf(&s, "export TMPDIR=/var/tmp VMRT_LAB=1\ncd %s || exit %d\nexec", quote(wd), exitLab)
	for _, a := range m.Command {
		s.WriteString(" " + quote(a))
	}
	s.WriteString("\n")
	return []byte(s.String()), nil
}

// quote makes a word of the shell's.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

func lastLines(s string, n int) string {
	lines := strings.SplitAfter(s, "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "")
}
