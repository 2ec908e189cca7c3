package config

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/pkg/hypervisor"
)

func TestParse(t *testing.T) {
	want := defaults()
	want.File = "f"
	if got, err := Parse("f", nil); err != nil || !cmp.Equal(got, want) {
		t.Errorf("Parse of an empty file = %+v, %v; want the defaults", got, err)
	}
	got, err := Parse("f", []byte(`
# every key
accelerator = "tcg"
vsock = "vhost-user"
kernel = "stock"
guest_dir = "/opt/guest"
qemu = "/opt/qemu"
virtiofsd = "/opt/virtiofsd"
passt = "/opt/passt"
memory_mib = 512
cpus = 4
late_interfaces = 3
boot_timeout = "1m30s"
state_dir = "/run/other"
`))
	want = &Config{
		File: "f", Accelerator: hypervisor.TCG, Vsock: VsockVhostUser, Kernel: guest.Stock, GuestDir: "/opt/guest",
		QEMU: "/opt/qemu", Virtiofsd: "/opt/virtiofsd", Passt: "/opt/passt", MemoryMiB: 512, CPUs: 4, LateInterfaces: 3, BootTimeout: 90 * time.Second, StateDir: "/run/other",
	}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("Parse() error %v (-want +got):\n%s", err, diff)
	}
}

func TestParseErrors(t *testing.T) {
	tests := []struct{ name, in, want string }{
		{"unknown key", "cpus = 1\nacellerator = \"kvm\"", "configuration f: line 2: unknown key acellerator"},
		{"two unknown keys", "a = 1\n[qemu2]\nb = 2", "configuration f: line 1: unknown key a\nline 2: unknown key qemu2"},
		{"syntax", "cpus = 1\nvsock = \n", "configuration f: line 2: "},
		{"twice", "cpus = 1\ncpus = 2", "configuration f: line 2: key cpus is already defined"},
		{"also a table", "cpus = 1\n[cpus]", "configuration f: line 2: key cpus should be a table"},
		{"string for a number", "\ncpus = \"2\"", "configuration f: line 2: cpus: want a whole number"},
		{"fraction", "memory_mib = 1.5", "configuration f: line 1: memory_mib: want a whole number"},
		{"huge number", "memory_mib = 99999999999999999999", "configuration f: line 1: "},
		{"number for a string", "state_dir = 1", "configuration f: line 1: state_dir: want a string"},
		{"accelerator", `accelerator = "hvf"`, `configuration f: accelerator = "hvf": want one of auto, kvm, tcg`},
		{"vsock", `vsock = ""`, `configuration f: vsock = "": want one of auto, vhost, vhost-user`},
		{"kernel", `kernel = "Tuned"`, `configuration f: kernel = "Tuned": want one of auto, tuned, stock`},
		{"relative path", `qemu = "qemu-system-x86_64"`, `configuration f: qemu = "qemu-system-x86_64": want an absolute path`},
		{"no state directory", `state_dir = ""`, `configuration f: state_dir = "": want an absolute path`},
		{"little memory", "memory_mib = 63", "configuration f: memory_mib = 63: want 64 to 16777216"},
		{"no CPU", "cpus = 0", "configuration f: cpus = 0: want 1 to 64"},
		{"many interfaces", "late_interfaces = 9", "configuration f: late_interfaces = 9: want 0 to 8"},
		{"no duration", `boot_timeout = "30"`, `configuration f: boot_timeout = "30": want a duration such as "30s"`},
		{"short timeout", `boot_timeout = "-1s"`, `configuration f: boot_timeout = "-1s": want 1s to 1h`},
		{"several values", "cpus = 65\nmemory_mib = 1", "configuration f: memory_mib = 1: want 64 to 16777216\ncpus = 65: want 1 to 64"},
		{"NUL", "\x00", "configuration f: line 1: "},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, err := Parse("f", []byte(tt.in))
			if c != nil || err == nil || !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("Parse(%q) = %v, %v; want %s", tt.in, c, err, tt.want)
			}
		})
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		t.Helper()
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	one, two, three := file("1", "cpus = 1"), file("2", "cpus = 2"), file("3", "cpus = 3")
	absent := filepath.Join(dir, "absent")
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		explicit, env, fallback string
		file                    string
		cpus                    int
	}{
		{one, two, three, one, 1},
		{"", two, three, two, 2},
		{"", "", three, three, 3},
		{"", "", absent, "", 1},
	} {
		c, err := load(tt.explicit, tt.env, tt.fallback)
		if err != nil || c.File != tt.file || c.CPUs != tt.cpus {
			t.Errorf("load(%q, %q, %q) = %+v, %v; want %q", tt.explicit, tt.env, tt.fallback, c, err, tt.file)
		}
	}
	t.Setenv(PathEnv, two)
	if c, err := Load(""); err != nil || c.File != two {
		t.Errorf("Load() with $%s = %+v, %v; want %s", PathEnv, c, err, two)
	}
	for _, bad := range []struct{ explicit, env, want string }{
		{absent, two, "read configuration: open " + absent + ": no such file"},
		{"", absent, "read configuration: open " + absent + ": no such file"},
		{dir, "", "read configuration: read " + dir + ": is a directory"},
		{fifo, "", fifo + " is a FIFO"},
		{file("big", strings.Repeat("#", maxFile+1)), "", "more than 1 MiB"},
	} {
		if c, err := load(bad.explicit, bad.env, three); c != nil || err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("load(%q, %q) = %v, %v; want %s", bad.explicit, bad.env, c, err, bad.want)
		}
	}
}

// TestReference checks that the reference has a section for each key, which
// gives its default, and no other.
func TestReference(t *testing.T) {
	b, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	var got, want []string
	for _, line := range strings.Split(string(b), "\n") {
		if key, ok := strings.CutPrefix(line, "### "); ok {
			got = append(got, strings.Trim(key, "`"))
		}
	}
	typ := reflect.TypeFor[file]()
	for i := range typ.NumField() {
		want = append(want, typ.Field(i).Tag.Get("toml"))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("sections of docs/configuration.md (-want +got):\n%s", diff)
	}
	// The example is the defaults, spelt out.
	_, example, _ := strings.Cut(string(b), "```toml\n")
	example, _, _ = strings.Cut(example, "```")
	d := defaults()
	d.File = "example"
	if c, err := Parse("example", []byte(example)); err != nil || !cmp.Equal(c, d) {
		t.Errorf("the example is %+v, %v; want the defaults %+v", c, err, d)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("cpus = 2\nboot_timeout = \"1m\"\n[x]\ny = 1"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := Parse("f", b)
		if (c == nil) == (err == nil) {
			t.Errorf("Parse(%q) = %v, %v; want one of them", b, c, err)
		}
		if err == nil && c.validate() != nil {
			t.Errorf("Parse(%q) = %+v, which is not valid", b, c)
		}
	})
}
