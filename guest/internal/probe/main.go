//go:build linux

// Probe is the init of a virtual machine under test: it finds out what the
// guest's kernel can do, sends that to the host over vsock as JSON, and resets
// the machine.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/guest/internal/report"
)

func main() {
	if len(os.Args) > 1 { // in a container
		if os.Args[1] == "ask" {
			os.Exit(ask())
		}
		for {
			_ = unix.Pause() // returns with every signal
		}
	}
	fmt.Println(report.Mark)
	if err := run(); err != nil {
		fmt.Println("probe:", err)
	}
	// A triple fault, which -no-reboot turns into QEMU's end.
	fmt.Println("probe: reboot:", unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART))
}

func run() error {
	err := errors.Join(
		mount("proc", "proc", "/proc", ""),
		mount("sysfs", "sysfs", "/sys", ""),
		mount("devtmpfs", "devtmpfs", "/dev", ""),
		mount("tmpfs", "tmpfs", "/run", ""),
	)
	if err != nil {
		return err
	}
	r := report.Report{Works: make(map[string]string)}
	r.Boot = load("/lib/vmrt/modules")
	r.Late = load("/lib/vmrt/modules.late")
	r.Drivers = drivers()
	r.FileSystems = fileSystems()
	r.Xtables = xtables()
	for name, try := range attempts {
		r.Works[name] = text(try())
	}
	r.Release = strings.TrimSpace(read("/proc/sys/kernel/osrelease"))
	r.Controllers = strings.Fields(read("/sys/fs/cgroup/cgroup.controllers"))
	r.CPUs = strings.Count(read("/proc/cpuinfo"), "processor\t:")
	r.Clock = strings.TrimSpace(read("/sys/devices/system/clocksource/clocksource0/current_clocksource"))
	return send(&r)
}

// load loads the modules in a list and returns what failed. A list that is
// missing is empty.
func load(list string) map[string]string {
	failed := make(map[string]string)
	for file := range strings.FieldsSeq(read(list)) {
		f, err := os.Open(file)
		if err == nil {
			err = unix.FinitModule(int(f.Fd()), "", 0)
			f.Close()
		}
		if err != nil {
			failed[filepath.Base(file)] = err.Error()
		}
	}
	return failed
}

// drivers returns the driver of every virtio device by the device's type, in
// hexadecimal digits as sysfs has it.
func drivers() map[string]string {
	found := make(map[string]string)
	devices, _ := filepath.Glob("/sys/bus/virtio/devices/*") // the pattern is well-formed
	for _, d := range devices {
		driver, err := os.Readlink(d + "/driver")
		if err != nil {
			driver = "none"
		}
		found[strings.TrimSpace(read(d+"/device"))] = filepath.Base(driver)
	}
	return found
}

func fileSystems() []string {
	var names []string
	for l := range strings.Lines(read("/proc/filesystems")) {
		names = append(names, strings.TrimSpace(strings.TrimPrefix(l, "nodev")))
	}
	return names
}

// xtables returns the matches and targets of iptables and ip6tables.
func xtables() map[string][]string {
	found := make(map[string][]string)
	files, _ := filepath.Glob("/proc/net/ip*_tables_*") // the pattern is well-formed
	for _, f := range files {
		found[filepath.Base(f)] = strings.Fields(read(f))
	}
	return found
}

// attempts are things that the agent and containers do.
var attempts = map[string]func() error{
	"crun":     lifecycle,
	"virtiofs": shared,
	"overlay":  overlay,
	"mqueue":   func() error { return mount("mqueue", "mqueue", "/run/mqueue", "") },
	"devpts":   func() error { return mount("devpts", "devpts", "/run/pts", "ptmxmode=0666") },
	"nf_tables": func() error {
		return netlink(unix.NETLINK_NETFILTER, unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETGEN)
	},
	"conntrack": func() error {
		// IPCTNL_MSG_CT_GET_STATS, include/uapi/linux/netfilter/nfnetlink_conntrack.h
		return netlink(unix.NETLINK_NETFILTER, unix.NFNL_SUBSYS_CTNETLINK<<8|5)
	},
	"tun":     func() error { return open("/dev/net/tun") },
	"fuse":    func() error { return open("/dev/fuse") },
	"loop":    func() error { return open("/dev/loop-control") },
	"kmsg":    func() error { return open("/dev/kmsg") },
	"hwrng":   func() error { return open("/dev/hwrng") },
	"userns":  func() error { return open("/proc/self/ns/user") },
	"timens":  func() error { return open("/proc/self/ns/time") },
	"seccomp": func() error { return open("/proc/sys/kernel/seccomp/actions_avail") },
	"bpf":     cgroupBPF,
	"trylock": trylock,
	"ipv6":    func() error { return open("/proc/net/if_inet6") },
}

func mount(fstype, source, target, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, fstype, 0, data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", fstype, target, err)
	}
	return nil
}

// shared mounts the host's folder and answers a file of it.
func shared() error {
	if err := mount("virtiofs", report.Tag, "/run/shared", ""); err != nil {
		return err
	}
	b, err := os.ReadFile("/run/shared/question")
	if err != nil {
		return err
	}
	return os.WriteFile("/run/shared/answer", b, 0o600)
}

func overlay() error {
	for _, d := range []string{"lower", "upper", "work"} {
		if err := os.MkdirAll("/run/o/"+d, 0o755); err != nil {
			return err
		}
	}
	return mount("overlay", "overlay", "/run/o/merged", "lowerdir=/run/o/lower,upperdir=/run/o/upper,workdir=/run/o/work")
}

func open(file string) error {
	fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// netlink sends a netfilter request without arguments. A subsystem that the
// kernel lacks answers EINVAL.
func netlink(protocol int, kind uint16) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// struct nlmsghdr with NLM_F_REQUEST, struct nfgenmsg of zeros.
	msg := []byte{20, 0, 0, 0, byte(kind), byte(kind >> 8), 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	if err := unix.Sendto(fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil {
		return err
	}
	if n < 20 {
		return fmt.Errorf("netlink answer of %d bytes", n)
	}
	if answer[4] == unix.NLMSG_ERROR && answer[5] == 0 {
		code := int32(uint32(answer[16]) | uint32(answer[17])<<8 | uint32(answer[18])<<16 | uint32(answer[19])<<24)
		if code != 0 {
			return unix.Errno(-code)
		}
	}
	return nil
}

func send(r *report.Report) error {
	port, err := hostPort()
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("vsock: %w", err)
	}
	f := os.NewFile(uintptr(fd), "vsock")
	defer f.Close()
	if err := unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: port}); err != nil {
		return fmt.Errorf("vsock connect to host port %d: %w", port, err)
	}
	if err := json.NewEncoder(f).Encode(r); err != nil {
		return fmt.Errorf("send report: %w", err)
	}
	// The reset must not overtake the data: wait for the host to have it.
	if err := unix.Shutdown(fd, unix.SHUT_WR); err != nil {
		return fmt.Errorf("send report: %w", err)
	}
	_, err = bufio.NewReader(f).ReadByte()
	_ = err // the end of the connection is all that is waited for
	return nil
}

// hostPort reads the port from the kernel's command line.
func hostPort() (uint32, error) {
	for arg := range strings.FieldsSeq(read("/proc/cmdline")) {
		if v, ok := strings.CutPrefix(arg, report.PortArg); ok {
			p, err := strconv.ParseUint(v, 10, 32)
			return uint32(p), err
		}
	}
	return 0, errors.New("no port on the command line")
}

// read returns a file's content, or nothing.
func read(file string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	return string(b)
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
