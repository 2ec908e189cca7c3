//go:build linux

// Command guest is PID 1 of the virtual machine that the tests of package
// storage start. It connects to the host's vsock port that the kernel's
// argument vmrt_test.port names and does what the host asks for, one JSON
// object a line, answering each with one.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Request and Answer are known to vm_test.go as well.
type Request struct {
	Op, Path, Data string
}

type Answer struct {
	Errno      unix.Errno
	Data       string
	Names      []string
	Dev, Ino   uint64
	Nlink      uint64
	IsDir      bool
	Mode, Rdev uint64
}

func main() {
	if err := serve(); err != nil {
		fmt.Println("guest:", err)
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func serve() error {
	for fs, dir := range map[string]string{"proc": "/proc", "devtmpfs": "/dev"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(fs, dir, fs, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	var port uint32
	for _, arg := range strings.Fields(string(cmdline)) {
		fmt.Sscanf(arg, "vmrt_test.port=%d", &port)
	}
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: port}); err != nil {
		return fmt.Errorf("connect to the host's port %d: %w", port, err)
	}
	host := os.NewFile(uintptr(fd), "host")
	in, out := json.NewDecoder(bufio.NewReader(host)), json.NewEncoder(host)
	for {
		var r Request
		if err := in.Decode(&r); err != nil {
			return fmt.Errorf("request: %w", err)
		}
		var a Answer
		if err := do(r, &a); err != nil {
			a.Errno = errno(err)
		}
		if err := out.Encode(a); err != nil {
			return fmt.Errorf("answer: %w", err)
		}
	}
}

func do(r Request, a *Answer) error {
	switch r.Op {
	case "mount":
		if err := os.MkdirAll(r.Path, 0o755); err != nil {
			return err
		}
		return unix.Mount(r.Data, r.Path, "virtiofs", 0, "")
	case "unmount":
		return unix.Unmount(r.Path, unix.UMOUNT_NOFOLLOW)
	case "read":
		b, err := os.ReadFile(r.Path)
		a.Data = string(b)
		return err
	case "write":
		return os.WriteFile(r.Path, []byte(r.Data), 0o644)
	case "remove":
		return os.Remove(r.Path)
	case "mkdir":
		return os.Mkdir(r.Path, 0o755)
	case "link":
		return os.Link(r.Data, r.Path)
	case "symlink":
		return os.Symlink(r.Data, r.Path)
	case "mknod":
		return unix.Mknod(r.Path, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3)))
	case "chown":
		return os.Chown(r.Path, 1234, 4321)
	case "list":
		entries, err := os.ReadDir(r.Path)
		for _, e := range entries {
			a.Names = append(a.Names, e.Name())
		}
		return err
	case "stat":
		var st unix.Stat_t
		err := unix.Lstat(r.Path, &st)
		a.Dev, a.Ino, a.Nlink = st.Dev, st.Ino, uint64(st.Nlink)
		a.IsDir = st.Mode&unix.S_IFMT == unix.S_IFDIR
		a.Mode, a.Rdev = uint64(st.Mode), st.Rdev
		return err
	case "setxattr":
		name, value, _ := strings.Cut(r.Data, "=")
		return unix.Setxattr(r.Path, name, []byte(value), 0)
	case "getxattr":
		b := make([]byte, 256)
		n, err := unix.Getxattr(r.Path, r.Data, b)
		if err == nil {
			a.Data = string(b[:n])
		}
		return err
	default:
		return unix.ENOSYS
	}
}

func errno(err error) unix.Errno {
	for {
		if e, ok := err.(unix.Errno); ok {
			return e
		}
		u, ok := err.(interface{ Unwrap() error })
		if !ok {
			return unix.EPROTO
		}
		err = u.Unwrap()
	}
}
