package boot

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/idmap"
)

func TestParseCmdline(t *testing.T) {
	for _, tt := range []struct {
		cmdline string
		want    Cmdline
		wantErr string
	}{
		{"", Cmdline{Port: api.HostPort}, ""},
		{"console=ttyS0 quiet\n", Cmdline{Port: api.HostPort}, ""},
		{"quiet vmrt.port=4321 vmrt.debug\n", Cmdline{Port: 4321, Debug: true}, ""},
		{"vmrt.debug=0 vmrt.port=4294967295", Cmdline{Port: 1<<32 - 1}, ""},
		{"vmrt.gids=0:2000:1 vmrt.uids=0:1000:1,1:5000:9", Cmdline{Port: api.HostPort, IDs: idmap.Mapping{
			UIDs: []specs.LinuxIDMapping{{HostID: 1000, Size: 1}, {ContainerID: 1, HostID: 5000, Size: 9}},
			GIDs: []specs.LinuxIDMapping{{HostID: 2000, Size: 1}},
		}}, ""},
		{"vmrt.uids=0:1000", Cmdline{}, "vmrt.uids=0:1000"},
		{"vmrt.port=0", Cmdline{}, "vmrt.port=0"},
		{"vmrt.port=x", Cmdline{}, "vmrt.port=x"},
		{"vmrt.port=4294967296", Cmdline{}, "vmrt.port=4294967296"},
	} {
		got, err := parseCmdline(tt.cmdline)
		if tt.wantErr != "" {
			if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
				t.Errorf("parseCmdline(%q) = %v; want %q", tt.cmdline, err, tt.wantErr)
			}
			continue
		}
		if !reflect.DeepEqual(got, tt.want) || err != nil {
			t.Errorf("parseCmdline(%q) = %+v, %v; want %+v", tt.cmdline, got, err, tt.want)
		}
	}
}

func TestSysctl(t *testing.T) {
	for _, tt := range []struct {
		name    string
		setting sysctl
		before  string
		want    string
	}{
		{"set", sysctl{path: "x", value: "1"}, "0\n", "1\n"},
		{"raise", sysctl{path: "x", value: "100", atLeast: true}, "99\n", "100"},
		{"keep what is more", sysctl{path: "x", value: "100", atLeast: true}, "101\n", "101\n"},
		{"keep the same", sysctl{path: "x", value: "100", atLeast: true}, "100\n", "100\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir() + "/"
			if err := os.WriteFile(root+"x", []byte(tt.before), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := tt.setting.set(root); err != nil {
				t.Fatal(err)
			}
			if got, _ := os.ReadFile(root + "x"); string(got) != tt.want {
				t.Errorf("set(%+v) over %q left %q; want %q", tt.setting, tt.before, got, tt.want)
			}
		})
	}
	for _, s := range []sysctl{{path: "missing", value: "1"}, {path: "missing", value: "1", atLeast: true}} {
		if err := s.set(t.TempDir() + "/"); err != nil {
			t.Errorf("set(%+v) without the file = %v; want nil", s, err)
		}
	}
	root := t.TempDir() + "/"
	os.WriteFile(root+"x", []byte("many\n"), 0o644)
	if err := (sysctl{path: "x", value: "1", atLeast: true}).set(root); err == nil {
		t.Error("set() over a word = nil; want an error")
	}
}

func TestReadList(t *testing.T) {
	file := filepath.Join(t.TempDir(), "modules")
	if got, err := readList(file); got != nil || err != nil {
		t.Errorf("readList() without a file = %q, %v; want nothing", got, err)
	}
	os.WriteFile(file, []byte("/lib/a.ko\n\n/lib/b.ko.xz\n"), 0o644)
	got, err := readList(file)
	if diff := cmp.Diff([]string{"/lib/a.ko", "/lib/b.ko.xz"}, got); diff != "" || err != nil {
		t.Errorf("readList(), %v (-want +got):\n%s", err, diff)
	}
}

func TestLoadModuleErrors(t *testing.T) {
	dir := t.TempDir()
	missing := filepath.Join(dir, "missing.ko")
	if err := loadModule(missing); err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("loadModule(%s) = %v; want an error that names it", missing, err)
	}
}

func TestParameters(t *testing.T) {
	for path, want := range map[string]string{
		"/lib/modules/6.1.0/kernel/drivers/net/dummy.ko":     "numdummies=0",
		"/lib/modules/6.12.0/kernel/drivers/net/dummy.ko.xz": "numdummies=0",
		"/lib/modules/6.1.0/kernel/drivers/net/tun.ko":       "",
	} {
		if got := parameters(path); got != want {
			t.Errorf("parameters(%s) = %q; want %q", path, got, want)
		}
	}
}

func TestPhases(t *testing.T) {
	var p Phases
	p.Mark("first")
	p.Mark("second")
	var b bytes.Buffer
	if _, err := p.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	line := b.String()
	if strings.Count(line, "\n") != 1 || !strings.Contains(line, " first=") || strings.Index(line, " second=") < strings.Index(line, " first=") {
		t.Errorf("WriteTo() = %q; want one line with first and second", line)
	}
}
