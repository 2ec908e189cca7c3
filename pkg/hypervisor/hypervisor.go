// Package hypervisor says what a virtual machine is to the rest of the host
// side: Spec describes one as plain data, VM is a running one. A backend
// (pkg/hypervisor/qemu) turns the first into the second.
//
// The package knows nothing of containers. A Spec is validated once, by
// Validate, and never changed after; a VM's methods may be called from any
// goroutine. Nothing here promises that a guest is well-behaved or answers.
package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"unicode"
)

// Accelerator is what executes guest instructions.
type Accelerator string

// The accelerators. Auto is a wish only: accel.Choose turns it into one of the
// others.
const (
	Auto Accelerator = "auto"
	KVM  Accelerator = "kvm"
	TCG  Accelerator = "tcg"
)

// DefaultCacheDir is where facts about the host, which cost something to find
// out, are kept until it reboots. The dot keeps it apart from the folders of
// containerd's namespaces, whose names start with a letter or a digit.
const DefaultCacheDir = "/run/vmrt/.cache"

// MaxCPUs bounds a virtual machine's CPUs: the guest's kernel knows no more
// (guest/kernel.config.fragment, NR_CPUS).
const MaxCPUs = 64

// Spec is everything that is fixed when a virtual machine starts.
type Spec struct {
	// Name appears in the process list and in errors.
	Name string
	// Accelerator is KVM or TCG.
	Accelerator Accelerator
	// CPUs is the number of virtual CPUs, 1 to MaxCPUs.
	CPUs int
	// MemoryMiB is the guest's memory, at least 64.
	MemoryMiB int
	// Kernel and Initrd are paths of files that the VMM reads.
	Kernel, Initrd string
	// Cmdline holds kernel arguments beyond those that the backend adds for
	// its own devices.
	Cmdline []string
	// CmdlineDevices: the kernel can be told of its devices by arguments
	// (CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES), and need not have them described
	// by ACPI tables, whose interpreter takes a tenth of the boot.
	CmdlineDevices bool
	// Vsock is the guest's vsock device.
	Vsock Vsock
	// Shares are virtio-fs devices.
	Shares []Share
	// NICs are network interfaces, in the order in which the guest sees them.
	NICs []NIC
}

// Vsock is a virtio-vsock device. Exactly one of VhostFD and Backend is set;
// both stay the caller's to close once Launch has returned.
type Vsock struct {
	// CID is the guest's context id, at least 3.
	CID uint32
	// VhostFD is an open /dev/vhost-vsock: the kernel serves the device.
	VhostFD *os.File
	// Backend is a connected unix socket that speaks vhost-user: the caller
	// serves the device.
	Backend *os.File
}

// Share is a virtio-fs device.
type Share struct {
	// Tag names the file system to the guest.
	Tag string
	// Socket is connected to a virtiofsd. The caller closes it once Launch
	// has returned.
	Socket *os.File
}

// NIC is a virtio-net device, either on a tap or on a stream.
type NIC struct {
	// MAC is the guest's hardware address: "02:00:00:00:00:01".
	MAC string
	// Stream is a connected stream socket that carries Ethernet frames, each
	// after its length as a big-endian uint32. The caller closes it once
	// Launch has returned.
	Stream *os.File
	// Tap holds one open tap descriptor for each queue; VhostNet, when not
	// empty, one open /dev/vhost-net for each. The caller closes them once
	// Launch has returned.
	Tap, VhostNet []*os.File
}

// SharedMemory reports whether the spec has a device served by another
// process, which must map the guest's memory.
func (s *Spec) SharedMemory() bool { return s.Vsock.Backend != nil || len(s.Shares) > 0 }

// ErrGuestStopped is matched by VM.Err when the guest itself ended the virtual
// machine in an orderly way: it powered off, reset or panicked.
var ErrGuestStopped = errors.New("the guest stopped")

// Validate returns the first thing that no backend can run.
func (s *Spec) Validate() error {
	switch {
	case s.Name == "" || hasControl(s.Name):
		return fmt.Errorf("vm spec: name %q: want printable characters", s.Name)
	case s.Accelerator != KVM && s.Accelerator != TCG:
		return fmt.Errorf("vm spec: accelerator %q: want %q or %q", s.Accelerator, KVM, TCG)
	case s.CPUs < 1 || s.CPUs > MaxCPUs:
		return fmt.Errorf("vm spec: %d CPUs: want 1 to %d", s.CPUs, MaxCPUs)
	case s.MemoryMiB < 64:
		return fmt.Errorf("vm spec: %d MiB of memory: want at least 64", s.MemoryMiB)
	case s.Kernel == "" || s.Initrd == "":
		return errors.New("vm spec: no kernel or no initrd")
	case s.Vsock.CID < 3 || s.Vsock.CID == 1<<32-1:
		return fmt.Errorf("vm spec: vsock CID %d is reserved", s.Vsock.CID)
	case (s.Vsock.VhostFD == nil) == (s.Vsock.Backend == nil):
		return errors.New("vm spec: want either a vhost descriptor or a vhost-user backend for vsock")
	}
	for _, arg := range s.Cmdline {
		if arg == "" || hasControl(arg) {
			return fmt.Errorf("vm spec: kernel argument %q: want printable characters", arg)
		}
	}
	tags := make(map[string]bool)
	for _, sh := range s.Shares {
		if sh.Tag == "" || len(sh.Tag) > 36 || hasControl(sh.Tag) || sh.Socket == nil {
			return fmt.Errorf("vm spec: share %q: want a tag of 1 to 36 bytes and a socket", sh.Tag)
		}
		if tags[sh.Tag] {
			return fmt.Errorf("vm spec: share %q: the tag is used twice", sh.Tag)
		}
		tags[sh.Tag] = true
	}
	for i := range s.NICs {
		if err := s.NICs[i].validate(); err != nil {
			return fmt.Errorf("vm spec: interface %d: %w", i, err)
		}
	}
	return nil
}

func (n *NIC) validate() error {
	mac, err := net.ParseMAC(n.MAC)
	switch {
	case err != nil || len(mac) != 6:
		return fmt.Errorf("MAC %q: want six octets", n.MAC)
	case mac[0]&1 != 0:
		return fmt.Errorf("MAC %s is a group address", n.MAC)
	case n.Stream != nil && len(n.Tap)+len(n.VhostNet) != 0:
		return errors.New("both a stream and a tap")
	case n.Stream != nil:
	case len(n.Tap) == 0 || slices.Contains(n.Tap, nil):
		return errors.New("no tap descriptor")
	case len(n.VhostNet) != 0 && (len(n.VhostNet) != len(n.Tap) || slices.Contains(n.VhostNet, nil)):
		return fmt.Errorf("%d vhost-net descriptors for %d queues", len(n.VhostNet), len(n.Tap))
	}
	return nil
}

// hasControl reports whether s holds a character that could end a line or an
// argument where a backend writes s.
func hasControl(s string) bool {
	return strings.ContainsFunc(s, unicode.IsControl)
}

// StartFunc starts a prepared command, as (*exec.Cmd).Start does. The caller
// of a backend decides with it in which namespaces, cgroup and under which
// parent thread the VMM runs. It may add to cmd.SysProcAttr.
type StartFunc func(cmd *exec.Cmd) error

// VM is a virtual machine whose VMM process was started.
type VM interface {
	// Pid returns the VMM's host pid. After Done it may belong to another
	// process.
	Pid() int
	// Done is closed when the VMM process has ended and was reaped.
	Done() <-chan struct{}
	// Err says why the VMM ended, with the end of its stderr and of the
	// guest's console. Nil before Done and after an end that Kill asked for;
	// ErrGuestStopped is in it when the guest ended the machine itself, which
	// is no fault when it was asked to.
	Err() error
	// Kill ends the VMM at once and waits for its end, or for ctx.
	// Idempotent; nil once the process is gone.
	Kill(ctx context.Context) error
}
