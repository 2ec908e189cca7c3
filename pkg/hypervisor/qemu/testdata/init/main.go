// Command init is PID 1 of the test machines. It says on the console what it
// finds, then does what its argument says: "poweroff", "reset", "exit" (which
// makes the kernel panic), "flood" the console, "read" the file hello of the
// virtio-fs tagged share, or sleep.
package main

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"
)

func main() {
	mount("proc", "/proc")
	mount("sysfs", "/sys")
	fmt.Println("vmrt-test: clocksource", read("/sys/devices/system/clocksource/clocksource0/current_clocksource"))
	fmt.Println("vmrt-test: cpus", read("/sys/devices/system/cpu/online"))
	fmt.Println("vmrt-test: uptime", read("/proc/uptime"))
	devices, err := os.ReadDir("/sys/bus/virtio/devices")
	if err != nil {
		fmt.Println("vmrt-test: no virtio bus:", err)
	}
	for _, d := range devices {
		fmt.Println("vmrt-test: virtio", d.Name(), read("/sys/bus/virtio/devices/"+d.Name()+"/device"))
	}
	for i := 0; ; i++ {
		mac, err := os.ReadFile(fmt.Sprintf("/sys/class/net/eth%d/address", i))
		if err != nil {
			break
		}
		fmt.Printf("vmrt-test: eth%d %s\n", i, bytes.TrimSpace(mac))
	}
	fmt.Println("vmrt-test: ready")
	if len(os.Args) > 1 {
		act(os.Args[1])
	}
	time.Sleep(1 << 40)
}

func mount(fs, dir string) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		fmt.Println("vmrt-test: mkdir:", err)
	}
	if err := syscall.Mount(strings.TrimPrefix(dir, "/"), dir, fs, 0, ""); err != nil {
		fmt.Println("vmrt-test: mount:", err)
	}
}

func act(verb string) {
	switch verb {
	case "poweroff":
		fmt.Println("vmrt-test:", syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF))
	case "reset":
		fmt.Println("vmrt-test:", syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART))
	case "exit":
		os.Exit(7)
	case "read":
		mount("virtiofs", "/share")
		fmt.Println("vmrt-test: hello is", read("/share/hello"))
	case "flood":
		for {
			os.Stdout.WriteString(strings.Repeat("\x1b[31m\x00flood ", 100))
		}
	}
}

func read(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(b))
}
