package qemu

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmrt/vmrt/pkg/hypervisor"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// file returns a file that was never opened: the command line only counts them.
func file(name string) *os.File { return os.NewFile(1<<30, name) }

var (
	qemu7  = Binary{Path: "/usr/bin/qemu", Version: Version{7, 2, 22}, Sandbox: true}
	qemu10 = Binary{Path: "/usr/bin/qemu", Version: Version{10, 0, 13}, Sandbox: true}
)

func testFiles() files {
	return files{kernel: file("kernel"), initrd: file("initrd"), console: file("console"), qmp: file("qmp")}
}

func minimal(a hypervisor.Accelerator) hypervisor.Spec {
	return hypervisor.Spec{
		Name: "web", Accelerator: a, CPUs: 1, MemoryMiB: 128, Kernel: "/k", Initrd: "/i",
		Vsock: hypervisor.Vsock{CID: 3, VhostFD: file("vhost-vsock")},
	}
}

// full returns a spec with every device there is.
func full(a hypervisor.Accelerator) hypervisor.Spec {
	s := minimal(a)
	s.Name = "web,1=a b"
	s.CPUs, s.MemoryMiB = 4, 2048
	s.Cmdline = []string{"vmrt.port=1024", "loglevel=7"}
	s.Vsock = hypervisor.Vsock{CID: 4711, Backend: file("vsock")}
	s.Shares = []hypervisor.Share{{Tag: "vmrt", Socket: file("share0")}, {Tag: "a,b", Socket: file("share1")}}
	s.NICs = []hypervisor.NIC{
		{MAC: "02:00:00:00:00:01", Tap: []*os.File{file("tap0")}},
		{MAC: "02:00:00:00:00:02", Tap: []*os.File{file("tap1q0"), file("tap1q1")}, VhostNet: []*os.File{file("vhost1q0"), file("vhost1q1")}},
		{MAC: "02:00:00:00:00:03", Stream: file("stream2")},
	}
	return s
}

func TestCommandLine(t *testing.T) {
	withKVM := testFiles()
	withKVM.kvm = file("kvm")
	noSandbox := qemu7
	noSandbox.Sandbox = false
	sansACPI, crowded := full(hypervisor.TCG), full(hypervisor.KVM)
	sansACPI.CmdlineDevices, crowded.CmdlineDevices = true, true
	for range 2 { // one more device than there are transports without ACPI
		crowded.NICs = append(crowded.NICs, crowded.NICs[0])
	}
	large := minimal(hypervisor.KVM)
	large.MemoryMiB = lowMemoryMiB + 1
	initArguments := minimal(hypervisor.TCG)
	initArguments.CmdlineDevices, initArguments.Cmdline = true, []string{"--", "read"}
	tests := map[string]struct {
		binary Binary
		host   host
		spec   hypervisor.Spec
		files  files
	}{
		"tcg-minimal":         {qemu7, host{TSCKHz: 2299998}, minimal(hypervisor.TCG), testFiles()},
		"tcg-full":            {qemu7, host{TSCKHz: 2299998}, full(hypervisor.TCG), testFiles()},
		"tcg-unknown-tsc":     {qemu10, host{}, minimal(hypervisor.TCG), testFiles()},
		"kvm-minimal":         {qemu7, host{}, minimal(hypervisor.KVM), testFiles()},
		"kvm-passed":          {qemu10, host{}, minimal(hypervisor.KVM), withKVM},
		"kvm-large":           {qemu7, host{}, large, testFiles()},
		"kvm-full":            {qemu10, host{}, full(hypervisor.KVM), testFiles()},
		"tcg-without-seccomp": {noSandbox, host{TSCKHz: 2299998}, minimal(hypervisor.TCG), testFiles()},
		"tcg-without-acpi":    {qemu7, host{TSCKHz: 2299998}, sansACPI, testFiles()},
		"tcg-init-arguments":  {qemu7, host{TSCKHz: 2299998}, initArguments, testFiles()},
		"kvm-many-devices":    {qemu10, host{}, crowded, testFiles()},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			before := tt.spec
			args, inherited, err := commandLine(tt.binary, tt.host, &tt.spec, tt.files)
			if err != nil {
				t.Fatalf("commandLine() = %v", err)
			}
			if diff := cmp.Diff(before, tt.spec, cmp.Comparer(func(a, b *os.File) bool { return a == b })); diff != "" {
				t.Errorf("commandLine() changed its spec:\n%s", diff)
			}
			golden(t, filepath.Join("testdata", name+".golden"), render(args, inherited))
		})
	}
}

// render writes an option and its value on a line, then the inherited files.
func render(args []string, inherited []*os.File) string {
	var b strings.Builder
	for i, a := range args {
		switch {
		case i == 0:
		case strings.HasPrefix(a, "-"):
			b.WriteByte('\n')
		default:
			b.WriteByte(' ')
		}
		b.WriteString(a)
	}
	b.WriteByte('\n')
	for i, f := range inherited {
		fmt.Fprintf(&b, "fd %d is %s\n", 3+i, f.Name())
	}
	return b.String()
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v; go test -run %s -update writes it", err, t.Name())
	}
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

// TestCommandLineDescriptors: whatever the spec, each inherited file is
// referred to by its number exactly once, and no other number is.
func TestCommandLineDescriptors(t *testing.T) {
	s := full(hypervisor.KVM)
	f := testFiles()
	f.kvm = file("kvm")
	args, inherited, err := commandLine(qemu10, host{}, &s, f)
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]int)
	for _, a := range args {
		for _, option := range strings.Split(a, ",") {
			if path, ok := strings.CutPrefix(option, "/proc/self/fd/"); ok {
				seen[path]++
			}
			key, value, _ := strings.Cut(option, "=")
			if slices.Contains([]string{"fd", "fds", "vhostfd", "vhostfds", "addr.str"}, key) {
				for _, n := range strings.Split(value, ":") {
					seen[n]++
				}
			}
		}
	}
	if len(seen) != len(inherited) {
		t.Errorf("%d descriptors referred to, %d inherited", len(seen), len(inherited))
	}
	for n, count := range seen {
		if count != 1 {
			t.Errorf("descriptor %s is referred to %d times", n, count)
		}
	}
}

func TestCommandLineLimits(t *testing.T) {
	long := minimal(hypervisor.TCG)
	long.Cmdline = []string{strings.Repeat("x", 2048)}
	many := minimal(hypervisor.TCG)
	for range 22 {
		many.NICs = append(many.NICs, hypervisor.NIC{MAC: "02:00:00:00:00:01", Tap: []*os.File{file("tap")}})
	}
	// QEMU's own arguments need room.
	fits := minimal(hypervisor.KVM)
	fits.Cmdline = []string{strings.Repeat("x", maxCmdline-len("console=ttyS0 quiet reboot=t panic=-1 "))}
	if _, _, err := commandLine(qemu7, host{}, &fits, testFiles()); err != nil {
		t.Errorf("commandLine() with %d arguments = %v; want none", maxCmdline, err)
	}
	fits.CmdlineDevices = true
	for name, s := range map[string]hypervisor.Spec{
		"kernel command line of": long, "2056 bytes: at most 1936": fits, "devices: at most 24": many,
	} {
		_, _, err := commandLine(qemu7, host{}, &s, testFiles())
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("commandLine() = %v; want an error with %q", err, name)
		}
	}
}

func TestParseVersion(t *testing.T) {
	tests := map[string]struct {
		out  string
		want Version
		ok   bool
	}{
		"debian 12":    {"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) ...\n", Version{7, 2, 22}, true},
		"debian 13":    {"QEMU emulator version 10.0.13 (Debian 1:10.0.13+ds-0+deb13u1)\n", Version{10, 0, 13}, true},
		"candidate":    {"QEMU emulator version 9.1.0-rc2", Version{9, 1, 0}, true},
		"two numbers":  {"QEMU emulator version 11.0", Version{11, 0, 0}, true},
		"empty":        {"", Version{}, false},
		"another tool": {"qemu-img version 7.2.22", Version{}, false},
		"long number":  {"QEMU emulator version 123456789012345678901234567890.1", Version{}, false},
		"second line":  {"hello\nQEMU emulator version 7.2.22", Version{}, false},
	}
	for name, tt := range tests {
		got, err := parseVersion([]byte(tt.out))
		if got != tt.want || (err == nil) != tt.ok {
			t.Errorf("%s: parseVersion(%q) = %v, %v; want %v, ok %v", name, tt.out, got, err, tt.want, tt.ok)
		}
	}
}
