package qemu_test

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test program is also a fake QEMU: a script calls it with what the fake
// shall do and with QEMU's arguments.
const fakeMarker = "vmrt-fake-qemu"

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == fakeMarker {
		fakeQEMU(os.Args[2], os.Args[3:])
	}
	code := m.Run()
	os.RemoveAll(cacheDir())
	os.Exit(code)
}

// fakeBinary returns a QEMU that reports its version as the real one does, and
// else runs fakes[behaviour].
func fakeBinary(t *testing.T, behaviour string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "qemu-fake")
	script := fmt.Sprintf("#!/bin/sh\ncase \"$*\" in *-version) echo 'QEMU emulator version 8.2.1 (fake)'; exit;; esac\nexec %s %s %s \"$@\"\n",
		self, fakeMarker, behaviour)
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// fake is what a behaviour gets to work with.
type fake struct {
	args         []string
	inherited    []int
	console, qmp net.Conn
}

var fakes = map[string]func(fake) int{
	"fail": func(f fake) int {
		fmt.Fprint(os.Stderr, "qemu-fake: a warning\nqemu-fake: could not load \x1b[1mkernel\x1b[0m '/proc/self/fd/3'\n")
		return 1
	},
	"silent-failure": func(fake) int { return 3 },
	"much-stderr": func(fake) int {
		for i := range 300 {
			fmt.Fprintf(os.Stderr, "line %d %s\n", i, strings.Repeat("x", 1000))
		}
		return 1
	},
	"linger": func(f fake) int { return f.linger() },
	"poweroff": func(f fake) int {
		f.greet()
		fmt.Fprintln(f.qmp, `{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}`)
		return 0
	},
	"panic": func(f fake) int {
		f.greet()
		fmt.Fprint(f.console, "first\nKernel panic - not syncing: no reason\nCall Trace:\n more\n")
		fmt.Fprintln(f.qmp, `{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}`)
		return 0
	},
	"bad-qmp": func(f fake) int { fmt.Fprintln(f.qmp, "\x00garbage"); return f.linger() },
	"console": func(f fake) int {
		fmt.Fprint(f.console, "one\r\n\x1b[31mtwo\x1b[0m\x07\n\n\xff\xfe three\tfour\u202e\n", strings.Repeat("y", 1300), "\nlast without an end")
		return f.linger()
	},
	"flood": func(f fake) int {
		for range 1 << 20 {
			if _, err := f.console.Write([]byte(strings.Repeat("flood ", 1000))); err != nil {
				return 1
			}
		}
		return 0
	},
	// A child that inherited everything outlives its parent.
	"orphan": func(f fake) int {
		cmd := exec.Command("/bin/sleep", "30")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if err := cmd.Start(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 2
		}
		fmt.Fprintln(os.Stderr, "orphan", cmd.Process.Pid)
		return 1
	},
	"files": func(f fake) int {
		for _, name := range []string{"-kernel", "-initrd"} {
			b, err := os.ReadFile(f.option(name))
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			fmt.Fprintf(f.console, "%s %s\n", name, b)
		}
		fmt.Fprintf(f.console, "uid %d gid %d\n", os.Getuid(), os.Getgid())
		wd, _ := os.Getwd()
		fmt.Fprintf(f.console, "LC_ALL=%s HOME=%s in %s\n", os.Getenv("LC_ALL"), os.Getenv("HOME"), wd)
		fmt.Fprintln(f.console, "inherited", f.inherited)
		fmt.Fprintln(f.console, "complete")
		return f.linger()
	},
}

func fakeQEMU(behaviour string, args []string) {
	f := fake{args: args, inherited: inherited()}
	f.console, f.qmp = f.chardev("console"), f.chardev("qmp")
	os.Exit(fakes[behaviour](f))
}

// inherited lists the descriptors that this process was started with: Go marks
// its own close-on-exec.
func inherited() []int {
	var list []int
	for fd := range 1024 {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			list = append(list, fd)
		}
	}
	return list
}

// linger stays until it is killed, a minute at most.
func (f fake) linger() int {
	time.Sleep(time.Minute)
	return 9
}

// option returns the value behind name.
func (f fake) option(name string) string {
	for i, a := range f.args[:len(f.args)-1] {
		if a == name {
			return f.args[i+1]
		}
	}
	return ""
}

// chardev opens a character device as QEMU would.
func (f fake) chardev(id string) net.Conn {
	m := regexp.MustCompile(`socket,id=` + id + `,fd=(\d+)`).FindStringSubmatch(strings.Join(f.args, " "))
	if m == nil {
		panic("no chardev " + id)
	}
	fd, err := strconv.Atoi(m[1])
	if err != nil {
		panic(err)
	}
	file := os.NewFile(uintptr(fd), id)
	conn, err := net.FileConn(file)
	if err != nil {
		panic(err)
	}
	file.Close()
	return conn
}

// greet goes through QMP's negotiation.
func (f fake) greet() {
	fmt.Fprintln(f.qmp, `{"QMP": {"version": {"qemu": {"micro": 1, "minor": 2, "major": 8}, "package": ""}, "capabilities": []}}`)
	line, err := bufio.NewReader(f.qmp).ReadString('\n')
	if err != nil {
		panic(err)
	}
	id := regexp.MustCompile(`"id":(\d+)`).FindStringSubmatch(line)
	fmt.Fprintf(f.qmp, `{"return": {}, "id": %s}`+"\n", id[1])
}
