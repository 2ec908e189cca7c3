// Package qemu runs virtual machines with QEMU's microvm machine: it turns a
// hypervisor.Spec into a command line, starts the process, and watches it.
//
// The machine has no firmware beyond qboot, no PCI, and no file or socket in
// the file system: kernel, initrd, console, QMP and all devices are descriptors
// that QEMU inherits. So it can run as a user who may open nothing.
//
// Launch may be called from any goroutine; so may the methods of VM. QEMU and
// the guest are not trusted: what they write is bounded, made printable, and
// read at a bounded rate. The machine ends with the thread that started it.
//
// Not guaranteed: that the guest boots, or that QEMU accepts the command line.
// Both are seen by VM.Done. Nothing here limits what QEMU uses of the host;
// that is for the cgroup that it is started in.
//
// Versions 7.2 to 10.0 of QEMU were tested. On other systems than Linux Launch
// fails with errors.ErrUnsupported.
package qemu

import (
	"context"
	"fmt"
	"log/slog"
	"syscall"

	"github.com/vmrt/vmrt/pkg/hypervisor"
)

// environment is all of it that QEMU gets; its messages are in English.
var environment = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}

// Config says how QEMU is run.
type Config struct {
	// Binary is the path of qemu-system-x86_64, or a name to look up in PATH.
	Binary string
	// Start starts the prepared command; nil is (*exec.Cmd).Start. QEMU gets
	// SIGKILL when the thread that forked it ends, so the caller must keep
	// that thread locked for as long as the machine shall live.
	Start hypervisor.StartFunc
	// Credential is who QEMU runs as; nil is the caller. Kernel and initrd
	// must be readable to it, but not the folders above them. Under KVM it
	// is given /dev/kvm by QEMU 9.0 and newer; for older ones the device's
	// group is added to Credential if that suffices.
	Credential *syscall.Credential
	// Console is called with each line of the guest's console, one call at a
	// time. Lines are printable and bounded; they are the guest's words. It
	// must return soon: the machine is not Done before. May be nil.
	Console func(line string)
	// Log is told what happens to the machine. May be nil.
	Log *slog.Logger
	// CacheDir keeps what was found out about the binary and the host; ""
	// is hypervisor.DefaultCacheDir. Only the caller's user may write there.
	CacheDir string
}

// Launch starts a virtual machine and returns once its process runs, without
// waiting for the guest or for QEMU's own start-up: a QEMU that ends at once is
// seen by Done and Err. ctx bounds Launch and not the machine. When it returns
// an error, nothing is left running and no descriptor open.
//
// QEMU inherits duplicates of the spec's descriptors and nothing else: Launch
// marks every descriptor of the calling process close-on-exec first, also those
// that this process itself had inherited.
func Launch(ctx context.Context, cfg Config, spec hypervisor.Spec) (hypervisor.VM, error) {
	vm, err := launch(ctx, cfg, &spec)
	if err != nil {
		return nil, fmt.Errorf("start vm %s: %w", spec.Name, err)
	}
	return vm, nil
}
