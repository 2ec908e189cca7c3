// Package boot makes a Linux system out of an initramfs: the part of PID 1
// that comes before any service. Early does what the services need, Late what
// the first container needs; the machine is announced as ready in between.
//
// Both are for PID 1 of a fresh virtual machine and run once.
package boot

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
)

// fsmount is one mount of the system's own.
type fsmount struct {
	fstype, target string
	flags          uintptr
	data           string
	optional       bool // the kernel may lack it
}

const (
	nosuid = unix.MS_NOSUID
	nodev  = unix.MS_NODEV
	noexec = unix.MS_NOEXEC
)

// early are the mounts that the services need, in order.
var early = []fsmount{
	{fstype: "proc", target: "/proc", flags: nosuid | nodev | noexec},
	{fstype: "sysfs", target: "/sys", flags: nosuid | nodev | noexec},
	{fstype: "devtmpfs", target: "/dev", flags: nosuid, data: "mode=0755"},
	{fstype: "tmpfs", target: "/run", flags: nosuid | nodev, data: "mode=0755"},
	{fstype: "tmpfs", target: "/tmp", flags: nosuid | nodev, data: "mode=1777"},
	{fstype: "cgroup2", target: cgroupRoot, flags: nosuid | nodev | noexec, data: "nsdelegate,memory_recursiveprot"},
}

// late are the mounts that only containers need.
var late = []fsmount{
	{fstype: "devpts", target: "/dev/pts", flags: nosuid | noexec, data: "gid=5,mode=0620,ptmxmode=0666"},
	{fstype: "tmpfs", target: "/dev/shm", flags: nosuid | nodev, data: "mode=1777"},
	{fstype: "mqueue", target: "/dev/mqueue", flags: nosuid | nodev | noexec, optional: true},
}

// links are the symbolic links of /dev that programs count on; crun reads
// resources from /dev/stdin.
var links = map[string]string{
	"/dev/fd":     "/proc/self/fd",
	"/dev/stdin":  "/proc/self/fd/0",
	"/dev/stdout": "/proc/self/fd/1",
	"/dev/stderr": "/proc/self/fd/2",
}

// deviceModes are the modes of devices that udev gives others than the kernel
// does (rules.d/50-udev-default.rules). A container in a user namespace gets the
// machine's own devices, not new ones with the mode that the host's have.
var deviceModes = map[string]uint32{
	"/dev/fuse":    0o666,
	"/dev/net/tun": 0o666,
	"/dev/kvm":     0o666,
}

// path is where the OCI runtime is found.
const path = "/bin:/sbin:/usr/bin:/usr/sbin"

// Early prepares file systems and kernel modules. It keeps to
// plain system calls: without hardware virtualisation the first run of every
// piece of code costs, and the host waits for this one.
func Early(p *Phases) error {
	unix.Umask(0o022)
	if err := leaveRootfs(); err != nil {
		return err
	}
	p.Mark("root")
	if err := mountAll(early); err != nil {
		return err
	}
	p.Mark("mounts")
	if err := unix.Mkdir(api.GuestRun, 0o711); err != nil {
		return &os.PathError{Op: "mkdir", Path: api.GuestRun, Err: err}
	}
	err := loadModules(modulesList)
	p.Mark("modules")
	return err
}

// SetEnvironment replaces the environment, which holds what the kernel did not
// understand of its command line.
func SetEnvironment() error {
	os.Clearenv()
	return os.Setenv("PATH", path)
}

// Late does the rest. Containers must wait for it. What is missing after an
// error, most containers will not miss.
func Late(p *Phases) error {
	var errs []error
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"late-mounts", func() error { return mountAll(late) }},
		{"links", func() error { return linkAll(links) }},
		{"controllers", delegateControllers},
		{"loopback", loopbackUp},
		{"limits", raiseLimits},
		{"sysctls", setSysctls},
		{"runtime", func() error { return sealRuntime(api.Runtime) }},
		{"late-modules", lateModules},
		{"device-modes", func() error { return setModes(deviceModes) }},
	} {
		errs = append(errs, step.do())
		p.Mark(step.name)
	}
	return errors.Join(errs...)
}

// leaveRootfs gives the root a mount of its own. pivot_root(2), which OCI
// runtimes use, does not work on the initramfs's.
func leaveRootfs() error {
	const dir = "/run" // any folder will do; nothing is mounted on it yet
	if err := unix.Mkdir(dir, 0o755); err != nil && err != unix.EEXIST {
		return &os.PathError{Op: "mkdir", Path: dir, Err: err}
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"bind / on " + dir, func() error { return unix.Mount("/", dir, "", unix.MS_BIND, "") }},
		{"chdir " + dir, func() error { return unix.Chdir(dir) }},
		{"move " + dir + " to /", func() error { return unix.Mount(".", "/", "", unix.MS_MOVE, "") }},
		{"chroot", func() error { return unix.Chroot(".") }},
		{"chdir /", func() error { return unix.Chdir("/") }},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	return nil
}

func mountAll(mounts []fsmount) error {
	for _, m := range mounts {
		if err := m.mount(); err != nil {
			return err
		}
	}
	return nil
}

func (m fsmount) mount() error {
	err := unix.Mount(m.fstype, m.target, m.fstype, m.flags, m.data)
	if err == unix.ENOENT {
		if err = unix.Mkdir(m.target, 0o755); err == nil {
			err = unix.Mount(m.fstype, m.target, m.fstype, m.flags, m.data)
		}
	}
	if err == nil || (m.optional && err == unix.ENODEV) {
		return nil
	}
	return fmt.Errorf("mount %s on %s: %w", m.fstype, m.target, err)
}

func linkAll(links map[string]string) error {
	var errs []error
	for name, target := range links {
		if err := unix.Symlink(target, name); err != nil && err != unix.EEXIST {
			errs = append(errs, &os.PathError{Op: "symlink", Path: name, Err: err})
		}
	}
	return errors.Join(errs...)
}

// setModes changes the modes of those files that there are.
func setModes(modes map[string]uint32) error {
	var errs []error
	for name, mode := range modes {
		if err := unix.Chmod(name, mode); err != nil && err != unix.ENOENT {
			errs = append(errs, &os.PathError{Op: "chmod", Path: name, Err: err})
		}
	}
	return errors.Join(errs...)
}

// cgroupRoot is the cgroup v2 hierarchy.
const cgroupRoot = "/sys/fs/cgroup"

// delegateControllers lets child groups use every controller.
func delegateControllers() error {
	var b [1024]byte
	n, err := readFile(cgroupRoot+"/cgroup.controllers", b[:])
	if err != nil {
		return err
	}
	const control = cgroupRoot + "/cgroup.subtree_control"
	controllers := strings.Fields(string(b[:n]))
	if writeFile(control, "+"+strings.Join(controllers, " +")) == nil {
		return nil
	}
	// One that cannot be enabled must not keep the others from it.
	var errs []error
	for _, c := range controllers {
		errs = append(errs, writeFile(control, "+"+c))
	}
	return errors.Join(errs...)
}

// loopbackUp brings up lo, which gets its addresses by that.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("loopback up: %w", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("loopback up: %w", err)
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, req); err != nil {
		return fmt.Errorf("loopback flags: %w", err)
	}
	req.SetUint16(req.Uint16() | unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("loopback up: %w", err)
	}
	return nil
}
