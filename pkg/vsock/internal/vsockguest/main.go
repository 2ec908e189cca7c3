// Command vsockguest is the guest's side of the tests of package vsock, run
// as the only process of a virtual machine.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/vsock/internal/exchange"
)

func main() {
	err := run()
	fmt.Println("vsockguest:", err)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	for dir, fs := range map[string]string{"/proc": "proc", "/dev": "devtmpfs"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		// The kernel may have mounted /dev itself.
		if err := unix.Mount(fs, dir, fs, 0, ""); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	if err := loadModules(); err != nil {
		return err
	}
	port, err := hostPort()
	if err != nil {
		return err
	}
	released := make(chan struct{})
	for p, handle := range map[uint32]func(*vsock.Conn){
		exchange.Port:      serve,
		exchange.PortClose: func(*vsock.Conn) {},
		exchange.PortUpper: upper,
		exchange.PortSmall: small,
		exchange.PortHold: func(c *vsock.Conn) {
			<-released
			serve(c)
		},
		exchange.PortRelease: func(*vsock.Conn) { released <- struct{}{} },
	} {
		l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, p, nil)
		if err != nil {
			return err
		}
		go accept(l, handle)
	}
	go serial()
	// The host counts on the listeners once it is called.
	c, err := vsock.Dial(vsock.Host, port, nil)
	if err != nil {
		return err
	}
	return exchange.Serve(c, make([]byte, 64<<10))
}

// loadModules loads what the initramfs of the guest files lists, if anything.
func loadModules() error {
	list, err := os.ReadFile("/lib/vmrt/modules")
	if os.IsNotExist(err) {
		return nil
	}
	for _, path := range strings.Fields(string(list)) {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		// The kernel unpacks those that are compressed.
		flags := 0
		if !strings.HasSuffix(path, ".ko") {
			flags = unix.MODULE_INIT_COMPRESSED_FILE
		}
		err = unix.FinitModule(int(f.Fd()), "", flags)
		f.Close()
		if err != nil && err != unix.EEXIST {
			return fmt.Errorf("load %s: %w", path, err)
		}
	}
	return err
}

// hostPort returns the number that the kernel's command line names.
func hostPort() (uint32, error) {
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return 0, err
	}
	for _, arg := range strings.Fields(string(b)) {
		if s, ok := strings.CutPrefix(arg, exchange.PortArg); ok {
			n, err := strconv.ParseUint(s, 10, 32)
			return uint32(n), err
		}
	}
	return 0, fmt.Errorf("no %s on the kernel's command line", exchange.PortArg)
}

func accept(l *vsock.Listener, handle func(*vsock.Conn)) {
	for {
		c, err := l.Accept()
		if err != nil {
			fmt.Println("vsockguest:", err)
			return
		}
		go func() {
			defer c.Close()
			handle(c.(*vsock.Conn))
		}()
	}
}

func serve(c *vsock.Conn) {
	if err := exchange.Serve(c, make([]byte, 256<<10)); err != nil {
		fmt.Println("vsockguest:", err)
	}
}

// small is serve with a small buffer.
func small(c *vsock.Conn) {
	raw, err := c.SyscallConn()
	if err == nil {
		err = errors.Join(raw.Control(func(fd uintptr) {
			// Linux counts some hundred bytes for the head of a packet.
			err = unix.SetsockoptUint64(int(fd), unix.AF_VSOCK, unix.SO_VM_SOCKETS_BUFFER_SIZE, 8<<10)
		}), err)
	}
	if err == nil {
		// What was sent before would be too much now.
		_, err = c.Write([]byte{1})
	}
	if err != nil {
		fmt.Println("vsockguest: set buffer size:", err)
		return
	}
	serve(c)
}

// upper reads to the end of the stream before it answers in capitals.
func upper(c *vsock.Conn) {
	b, err := io.ReadAll(c)
	if err == nil {
		_, err = c.Write([]byte(strings.ToUpper(string(b))))
	}
	if err != nil {
		fmt.Println("vsockguest:", err)
	}
}

// serial serves requests on a virtio-serial port, if there is one.
func serial() {
	ports, _ := filepath.Glob("/dev/vport*")
	if len(ports) == 0 {
		return
	}
	f, err := os.OpenFile(ports[0], os.O_RDWR, 0)
	if err == nil {
		err = exchange.Serve(f, make([]byte, 64<<10))
	}
	fmt.Println("vsockguest: serial:", err)
}
