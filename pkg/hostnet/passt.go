//go:build linux

// Package hostnet gives the virtual machine of a pod with the host's network a
// way out: passt (https://passt.top), which ends the guest's connections and
// makes them anew as the host's own.
//
// Contract. Find reads the host's network into a Template: the interface of its
// default route, with its addresses. The guest gets an interface of that name
// with the same addresses (Request), so that it takes itself for the host.
// Start runs a passt for one virtual machine, with the other end of its stream
// as a network device (hypervisor.NIC). Nothing of the host's network changes,
// and no port is opened: what listens in the guest is package portmirror's.
//
// passt runs in the host's network namespace, under the user id that the VMM
// has too, and confines itself: it has a user and mount namespaces of its own
// with an empty root, and a seccomp filter. It ends with the VMM.
//
// Concurrency: every method may be called from any goroutine.
//
// Not guaranteed: protocols beyond TCP, UDP and ICMP echo. What the host
// changes of its addresses later does not reach the guest.
package hostnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/daemon"
	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/podns"
)

// PasstConfig describes a passt.
type PasstConfig struct {
	// Binary is its path.
	Binary string
	// Credential is the user that it runs as, not root. Nil: passt picks.
	Credential *syscall.Credential
	// Template is the network that it serves; it has an interface.
	Template *Template
}

// Passt is a running passt.
type Passt struct {
	*daemon.Daemon
	nic hypervisor.NIC
}

// routerMAC are the hardware addresses under which passt answers for everybody:
// the first, unless that is the guest's.
var routerMAC = [2]net.HardwareAddr{{2, 0x76, 0x6d, 0, 0, 0xfe}, {2, 0x76, 0x6d, 0, 0, 0xfd}}

// StartPasst starts a passt in ns, which is in the host's network namespace.
// It returns without waiting for it: what the guest sends early is kept in the
// stream. ctx bounds the start only.
func StartPasst(ctx context.Context, ns *podns.Namespaces, cfg PasstConfig) (*Passt, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("start passt: socketpair: %w", err)
	}
	theirs, stream := os.NewFile(uintptr(fds[0]), "passt"), os.NewFile(uintptr(fds[1]), "network stream")
	defer theirs.Close()
	d, err := daemon.Start(ns, "passt", &exec.Cmd{
		Path:        cfg.Binary,
		Args:        append([]string{cfg.Binary}, cfg.arguments()...),
		Env:         []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Dir:         "/",
		ExtraFiles:  []*os.File{theirs}, // 3
		SysProcAttr: &syscall.SysProcAttr{Setsid: true, Credential: cfg.Credential},
	})
	if err != nil {
		stream.Close()
		if errors.Is(err, os.ErrNotExist) {
			err = ErrNoPasst
		}
		return nil, fmt.Errorf("start passt %s: %w", cfg.Binary, err)
	}
	return &Passt{Daemon: d, nic: hypervisor.NIC{MAC: cfg.Template.MAC.String(), Stream: stream}}, nil
}

// ErrNoPasst says that passt is missing, and what to do.
var ErrNoPasst = errors.New("the host's network needs passt: install the package passt")

// arguments is passt's command line: one connection, on the stream; no port
// forwarded, no address of the host's given another meaning, and no
// configuration offered beyond what the guest was told.
func (c PasstConfig) arguments() []string {
	t := c.Template
	router := routerMAC[0]
	if t.MAC.String() == router.String() {
		router = routerMAC[1]
	}
	args := []string{
		"--foreground", "--quiet", "--fd", "3",
		"--interface", t.Interface, "--mac-addr", router.String(), "--mtu", strconv.Itoa(t.MTU),
		"--tcp-ports", "none", "--udp-ports", "none", "--no-map-gw",
		"--dns", "none", "--search", "none", "--no-dhcp", "--no-dhcpv6", "--no-ra",
	}
	if t.IPv4.IsValid() {
		args = append(args, "--address", t.IPv4.Addr().String(), "--netmask", netmask(t.IPv4), "--gateway", t.Gateway4.String())
	} else {
		args = append(args, "--ipv6-only")
	}
	if t.IPv6.IsValid() {
		args = append(args, "--address", t.IPv6.Addr().String(), "--gateway", t.Gateway6.String())
	} else {
		args = append(args, "--ipv4-only")
	}
	return args
}

func netmask(p netip.Prefix) string { return net.IP(net.CIDRMask(p.Bits(), 32)).String() }

// NIC is the virtual machine's network device. Its file is open until
// ReleaseFile.
func (p *Passt) NIC() hypervisor.NIC { return p.nic }

// ReleaseFile closes this process's end of the stream, once the VMM has its
// own: passt then ends with the VMM. Idempotent.
func (p *Passt) ReleaseFile() { _ = p.nic.Stream.Close() }

// Close ends passt. Idempotent.
func (p *Passt) Close() {
	p.ReleaseFile()
	p.Daemon.Close()
}
