//go:build linux

package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/daemon"
	"github.com/vmrt/vmrt/pkg/podns"
)

// Sandbox is how virtiofsd confines itself to the shared folder.
type Sandbox string

// The sandboxes. Both daemons have both.
const (
	// SandboxNamespace is mount, pid and network namespaces of its own, with
	// the shared folder as root. The default: a daemon that was taken over
	// reaches nothing else.
	SandboxNamespace Sandbox = "namespace"
	// SandboxChroot is chroot(2), for hosts where the above is not allowed.
	SandboxChroot Sandbox = "chroot"
)

// DaemonConfig describes a virtio-fs daemon.
type DaemonConfig struct {
	// Binary is the path of virtiofsd, the one in C (QEMU before 8.0) or the
	// one in Rust. Empty: FindDaemon.
	Binary string
	// Share is the folder to serve.
	Share *Share
	// Sandbox is SandboxNamespace when empty.
	Sandbox Sandbox
	// Threads serve requests; with 0 the thread that reads them does.
	Threads int
}

// daemonPaths are where distributions install virtiofsd.
var daemonPaths = []string{
	"/usr/libexec/virtiofsd",
	"/usr/lib/qemu/virtiofsd",
	"/usr/lib/virtiofsd",
}

// FindDaemon returns the path of the machine's virtiofsd, or an error that
// names the Debian packages which have one.
func FindDaemon() (string, error) { return findDaemon(daemonPaths) }

func findDaemon(paths []string) (string, error) {
	for _, p := range paths {
		if unix.Access(p, unix.X_OK) == nil {
			return p, nil
		}
	}
	if p, err := exec.LookPath("virtiofsd"); err == nil {
		return p, nil
	}
	return "", errNoDaemon(paths[0])
}

func errNoDaemon(path string) error {
	return fmt.Errorf("virtiofsd is not installed: no %s (Debian 13: package virtiofsd; Debian 12: package qemu-system-common)", path)
}

// Daemon is a running virtiofsd. Done, Err and Pid are the process's; Err is nil
// after an end by itself when the VMM was gone.
type Daemon struct {
	*daemon.Daemon
	socket *os.File
}

// StartDaemon starts a virtiofsd in ns and returns without waiting for it to
// be ready: a VMM that is given Socket waits by itself. The daemon ends with
// the last copy of Socket, with Close, and with ns. ctx bounds the start only.
func StartDaemon(ctx context.Context, ns *podns.Namespaces, cfg DaemonConfig) (*Daemon, error) {
	binary := cfg.Binary
	if binary == "" {
		var err error
		if binary, err = FindDaemon(); err != nil {
			return nil, err
		}
	}
	dialect, err := daemonDialect(ctx, binary)
	if err != nil {
		return nil, err
	}
	var nofile unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &nofile); err != nil {
		return nil, fmt.Errorf("start virtiofsd: getrlimit: %w", err)
	}
	listener, socket, err := cfg.Share.socket()
	if err != nil {
		return nil, fmt.Errorf("start virtiofsd: %w", err)
	}
	defer listener.Close()
	d, err := daemon.Start(ns, "virtiofsd", &exec.Cmd{
		Path:       binary,
		Args:       append([]string{binary}, dialect(cfg, nofile.Max)...),
		Env:        []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Dir:        "/",
		ExtraFiles: []*os.File{listener}, // 3
		SysProcAttr: &syscall.SysProcAttr{
			Setsid: true,
			// As first of a pid namespace it takes along what it forks.
			Cloneflags: unix.CLONE_NEWPID,
		},
	})
	if err != nil {
		socket.Close()
		return nil, fmt.Errorf("start virtiofsd %s: %w", binary, err)
	}
	return &Daemon{Daemon: d, socket: socket}, nil
}

// arguments are a dialect of virtiofsd's command line.
type arguments func(cfg DaemonConfig, nofile uint64) []string

// daemonDialect asks the binary which virtiofsd it is.
func daemonDialect(ctx context.Context, binary string) (arguments, error) {
	out, err := exec.CommandContext(ctx, binary, "--version").CombinedOutput()
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, errNoDaemon(binary)
	case err != nil:
		return nil, fmt.Errorf("run %s --version: %w", binary, err)
	case strings.Contains(string(out), "FUSE kernel interface version"):
		return argumentsC, nil
	default:
		return argumentsRust, nil
	}
}

// What the daemons have in common: attributes and names are cached for a
// second (cache=auto), so that changes on the host are seen; locks stay in the
// guest; a folder that is a mount point becomes one in the guest, so that st_dev
// and st_ino tell files apart; xattrs pass, those that want privileges which
// the daemon has given up (trusted.*) do not.

func argumentsC(cfg DaemonConfig, nofile uint64) []string {
	return []string{
		"--fd=3", "-f",
		"-o", "source=" + strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(cfg.Share.Root()), // as libfuse reads it
		"-o", "sandbox=" + string(cfg.sandbox()),
		"-o", "cache=auto,xattr,announce_submounts,no_flock,no_posix_lock,log_level=warn",
		"--thread-pool-size=" + strconv.Itoa(cfg.Threads),
		"--rlimit-nofile=" + strconv.FormatUint(nofile, 10),
	}
}

func argumentsRust(cfg DaemonConfig, nofile uint64) []string {
	return []string{
		"--fd=3",
		"--shared-dir=" + cfg.Share.Root(),
		"--sandbox=" + string(cfg.sandbox()),
		"--cache=auto", "--xattr", "--announce-submounts", "--inode-file-handles=never", "--log-level=warn",
		"--thread-pool-size=" + strconv.Itoa(cfg.Threads),
		"--rlimit-nofile=" + strconv.FormatUint(nofile, 10),
	}
}

func (c DaemonConfig) sandbox() Sandbox {
	if c.Sandbox == "" {
		return SandboxNamespace
	}
	return c.Sandbox
}

// Socket returns the VMM's end of the vhost-user connection
// (hypervisor.Share.Socket).
func (d *Daemon) Socket() *os.File { return d.socket }

// CloseSocket closes this process's copy of Socket. The caller does so once
// the VMM has its own, so that the daemon notices the VMM's end. Idempotent.
func (d *Daemon) CloseSocket() { _ = d.socket.Close() }

// Close kills the daemon and waits for its end. Idempotent.
func (d *Daemon) Close() error {
	d.CloseSocket()
	d.Daemon.Close()
	return nil
}
