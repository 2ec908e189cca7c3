package qemu

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/vmrt/vmrt/pkg/hypervisor"
)

// maxCmdline is COMMAND_LINE_SIZE of arch/x86/include/asm/setup.h, less the
// terminating zero.
const maxCmdline = 2047

// How many virtio-mmio transports microvm has: more with ACPI, which gives it a
// second IO-APIC (hw/i386/microvm.c).
const (
	maxTransports         = 24
	maxTransportsSansACPI = 8
)

// deviceArgument is about what QEMU adds to the kernel's command line for each
// transport if there is no ACPI.
const deviceArgument = " virtio_mmio.device=512@0xfeb00e00:12"

// The paths by which QEMU knows the guest's files, which are the first ones it
// inherits.
const (
	kernelPath = "/proc/self/fd/3"
	initrdPath = "/proc/self/fd/4"
)

// files are what QEMU reads or talks through besides the spec's own devices.
type files struct {
	kernel, initrd *os.File
	console        *os.File
	qmp            *os.File
	// kvm is an open /dev/kvm for a QEMU that takes one, else nil.
	kvm *os.File
}

// commandLine turns a valid spec into QEMU's arguments, and lists the files
// that the process must inherit as descriptors 3, 4, and so on. It touches
// none of them.
func commandLine(b Binary, h host, s *hypervisor.Spec, f files) ([]string, []*os.File, error) {
	cmdline := strings.Join(kernelArguments(b, h, s), " ")
	limit := maxCmdline
	if !needsACPI(s) {
		limit -= transports(s) * len(deviceArgument)
	}
	if len(cmdline) > limit {
		return nil, nil, fmt.Errorf("kernel command line of %d bytes: at most %d", len(cmdline), limit)
	}
	if n := transports(s); n > maxTransports {
		return nil, nil, fmt.Errorf("%d devices: at most %d", n, maxTransports)
	}
	c := &arguments{}
	c.add("-name", "guest="+escape(s.Name)+",debug-threads=on")
	c.add("-nodefaults", "-no-user-config")
	c.add("-display", "none")
	c.add("-no-reboot")
	if b.Sandbox {
		c.add("-sandbox", sandboxRules)
	}
	c.add("-kernel", c.path(f.kernel)) // kernelPath
	c.add("-initrd", c.path(f.initrd)) // initrdPath
	c.add("-append", cmdline)
	c.machine(s, f)
	// qboot is the firmware made for microvm. The default has another name,
	// which not all packages have.
	c.add("-bios", "qboot.rom")
	c.chardev("console", f.console)
	c.add("-serial", "chardev:console")
	c.chardev("qmp", f.qmp)
	c.add("-mon", "chardev=qmp,mode=control")
	c.devices(s)
	return c.args, c.files, nil
}

// transports returns how many virtio devices the machine has, each of which
// takes a transport: those of the spec, the random generator and the balloon.
func transports(s *hypervisor.Spec) int { return 1 + len(s.NICs) + len(s.Shares) + 2 }

// needsACPI reports whether the guest must find its devices by ACPI. QEMU tells
// of them behind all arguments, where those behind "--" are init's.
func needsACPI(s *hypervisor.Spec) bool {
	return !s.CmdlineDevices || transports(s) > maxTransportsSansACPI || slices.Contains(s.Cmdline, "--")
}

// lowMemoryMiB is how much memory the machine has below 4 GiB (QEMU,
// hw/i386/microvm.c, microvm_memory_init).
const lowMemoryMiB = 3072

// kernelArguments returns the kernel's command line: what the machine needs
// first, so that what the spec adds can override it.
func kernelArguments(b Binary, h host, s *hypervisor.Spec) []string {
	args := []string{
		"console=ttyS0",
		// A character to the serial port is an exit each.
		"quiet",
		// A panic resets by triple fault at once, and -no-reboot turns
		// the reset into QEMU's end.
		"reboot=t", "panic=-1",
	}
	if !needsACPI(s) {
		args = append(args, "acpi=off") // else it complains
	}
	if s.MemoryMiB > lowMemoryMiB {
		// With memory above 4 GiB a kernel keeps 64 MiB for devices that do
		// not reach it. virtio devices do.
		args = append(args, "swiotlb=noforce")
	}
	if s.Accelerator == hypervisor.TCG {
		args = append(args, emulationArguments(b, h, s)...)
	}
	return append(args, s.Cmdline...)
}

// emulationArguments returns what the kernel must know of an emulated CPU.
func emulationArguments(b Binary, h host, s *hypervisor.Spec) []string {
	// Emulated code does not speculate. Patching every lock prefix, return and
	// indirect branch to be faster costs more than a boot can win back.
	// noreplace-thunks is the tuned kernel's; others hand it on to PID 1, in
	// its environment thanks to the "=1", rather than as an argument.
	args := []string{
		"mitigations=off", "noreplace-smp", "noreplace-thunks=1",
		// The rate of QEMU's local APIC timer (hw/intc/apic.c), for
		// kernels that can be told it rather than measuring for a tenth
		// of a second; others hand it on to PID 1's environment.
		"lapic_timer_khz=1000000",
	}
	if h.TSCKHz != 0 {
		// QEMU shows the guest the host's counter. Calibrating it
		// against an emulated timer may fail and hang the boot, and the
		// watchdog, which compares it with jiffies, takes a vCPU that
		// had to wait for a broken counter.
		args = append(args, "tsc_early_khz="+strconv.FormatUint(h.TSCKHz, 10), "tsc=reliable")
	}
	if len(s.Shares) > 0 {
		// TCG drops the translation of code that the guest overwrites, and
		// does not see what virtiofsd, another process, writes into the
		// guest's memory: a program read into a page that held code before
		// would run as that code. A page that the guest's CPU zeroes when
		// it allocates it has no translation left by then. Without this
		// most containers die with QEMU 10, by SIGSEGV or SIGILL; it costs
		// no measurable time.
		args = append(args, "init_on_alloc=1")
	}
	if b.Version.before(8, 0) {
		// QEMU before 8.0 emulates cmpxchg16b by stopping all vCPUs, and
		// kernels that use it in their allocator were seen to fault
		// there. The number is X86_FEATURE_CX16: names are only known
		// from Linux 5.17 on. Processes in the guest still see and may
		// use the instruction, which x86-64-v2 includes.
		args = append(args, "clearcpuid=141")
	}
	return args
}

// emulatedCPU is the CPU model under TCG: all that it can emulate, less the
// promise that rep movsb and rep stosb are fast. TCG goes through them byte by
// byte; a kernel and a libc that are not promised it copy 3 to 9 times faster.
const emulatedCPU = "max,-erms,-fsrm"

// translationCache is the size of TCG's cache, in MiB, touched as it fills. A
// boot translates to 31 MiB, so 16 would be flushed and filled again, which
// takes a fifth of the boot's time.
const translationCache = "64"

// arguments collects the command line and the files that it refers to.
type arguments struct {
	args  []string
	files []*os.File
}

func (c *arguments) add(args ...string) { c.args = append(c.args, args...) }

// fd passes f on and returns the number that it has in QEMU.
func (c *arguments) fd(f *os.File) string {
	c.files = append(c.files, f)
	return strconv.Itoa(2 + len(c.files))
}

func (c *arguments) fds(fs []*os.File) string {
	n := make([]string, len(fs))
	for i, f := range fs {
		n[i] = c.fd(f)
	}
	return strings.Join(n, ":")
}

// path passes f on for an option that takes nothing but a path. Opening it
// checks the file's own permissions, not those of the folders above it.
func (c *arguments) path(f *os.File) string { return "/proc/self/fd/" + c.fd(f) }

// chardev adds a character device on a connected socket.
func (c *arguments) chardev(id string, f *os.File) {
	c.add("-chardev", "socket,id="+id+",fd="+c.fd(f))
}

func (c *arguments) device(options string) { c.add("-device", options) }

func (c *arguments) machine(s *hypervisor.Spec, f files) {
	machine := "microvm,acpi=off,x-option-roms=off"
	if needsACPI(s) {
		machine = "microvm,acpi=on,x-option-roms=off"
	}
	if s.SharedMemory() {
		machine += ",memory-backend=mem"
		c.add("-object", fmt.Sprintf("memory-backend-memfd,id=mem,size=%dM,share=on", s.MemoryMiB))
	}
	c.add("-machine", machine)
	switch s.Accelerator {
	case hypervisor.KVM:
		accel := "kvm"
		if f.kvm != nil {
			c.add("-add-fd", "set=1,fd="+c.fd(f.kvm))
			accel += ",device=/dev/fdset/1"
		}
		c.add("-accel", accel, "-cpu", "host")
	case hypervisor.TCG:
		c.add("-accel", "tcg,tb-size="+translationCache, "-cpu", emulatedCPU)
	}
	c.add("-smp", smp(s))
	c.add("-m", strconv.Itoa(s.MemoryMiB)+"M")
	// Legacy transports know neither virtio 1 nor vhost-user.
	c.add("-global", "virtio-mmio.force-legacy=false")
}

// smp returns the processors. With one alone the translator makes no atomic
// instructions and so no memory barriers (tcg_gen_atomic_add_fetch_i32_chk in
// QEMU's tcg-op-ldst.c), although devices run in threads and processes beside
// it: a notification of either side can then be lost, and the machine waits for
// ever. That a second processor could be plugged in makes it emit them.
func smp(s *hypervisor.Spec) string {
	if s.CPUs == 1 && s.Accelerator == hypervisor.TCG {
		return "1,maxcpus=2"
	}
	return strconv.Itoa(s.CPUs)
}

func (c *arguments) devices(s *hypervisor.Spec) {
	if s.Vsock.VhostFD != nil {
		c.device(fmt.Sprintf("vhost-vsock-device,guest-cid=%d,vhostfd=%s", s.Vsock.CID, c.fd(s.Vsock.VhostFD)))
	} else {
		c.chardev("vsock", s.Vsock.Backend)
		c.device("vhost-user-vsock-device,chardev=vsock")
	}
	for i, n := range s.NICs {
		c.nic(i, n)
	}
	for i, sh := range s.Shares {
		id := "fs" + strconv.Itoa(i)
		c.chardev(id, sh.Socket)
		c.device("vhost-user-fs-device,chardev=" + id + ",tag=" + escape(sh.Tag))
	}
	c.device("virtio-rng-device")
	c.device("virtio-balloon-device,free-page-reporting=on")
}

func (c *arguments) nic(i int, n hypervisor.NIC) {
	id := "net" + strconv.Itoa(i)
	var netdev string
	if n.Stream != nil {
		netdev = "stream,id=" + id + ",server=off,addr.type=fd,addr.str=" + c.fd(n.Stream)
	} else {
		netdev = "tap,id=" + id + ",fds=" + c.fds(n.Tap)
	}
	if len(n.VhostNet) > 0 {
		netdev += ",vhost=on,vhostfds=" + c.fds(n.VhostNet)
	}
	c.add("-netdev", netdev)
	device := "virtio-net-device,netdev=" + id + ",mac=" + n.MAC
	if len(n.Tap) > 1 {
		device += ",mq=on"
	}
	c.device(device)
}

// escape makes s one value of QEMU's key=value lists, in which a comma is
// written twice (docs/system/invocation).
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }
