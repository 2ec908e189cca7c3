package guestspec

import (
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/api"
)

var update = flag.Bool("update", false, "write the golden files")

// guestDevices is what a small guest has.
var guestDevices = []*api.Device{
	{Path: "/dev/null", Type: "c", Major: 1, Minor: 3, Mode: 0o666},
	{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229, Mode: 0o666},
	{Path: "/dev/net/tun", Type: "c", Major: 10, Minor: 200, Mode: 0o666},
	{Path: "/dev/userfaultfd", Type: "c", Major: 10, Minor: 126, Mode: 0o600},
	{Path: "/dev/ttyS0", Type: "c", Major: 4, Minor: 64, Mode: 0o600},
	{Path: "/dev/sda", Type: "b", Major: 8, Minor: 0, Mode: 0o660},
	{Path: "/dev/ptmx", Type: "c", Major: 5, Minor: 2, Mode: 0o666},
	{Path: "/dev/console", Type: "c", Major: 5, Minor: 1, Mode: 0o600},
}

// ctrSpec returns what `ctr run` generates.
func ctrSpec(t testing.TB) *specs.Spec {
	t.Helper()
	return readSpec(t, "testdata/ctr.json")
}

func readSpec(t testing.TB, name string) *specs.Spec {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	s := new(specs.Spec)
	if err := json.Unmarshal(b, s); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return s
}

func input(s *specs.Spec) Input {
	return Input{ID: "web", Bundle: "/run/bundle/web", Spec: s, GuestDevices: guestDevices}
}

// rewrite rewrites what `ctr run` generates after change was applied to it,
// and checks that the input is left alone.
func rewrite(t *testing.T, change func(*specs.Spec)) (*Plan, error) {
	t.Helper()
	s, want := ctrSpec(t), ctrSpec(t)
	if change != nil {
		change(s)
		change(want)
	}
	plan, err := Rewrite(input(s))
	if diff := cmp.Diff(want, s); diff != "" {
		t.Errorf("Rewrite changed its input (-want +got):\n%s", diff)
	}
	return plan, err
}

func TestGolden(t *testing.T) {
	for _, name := range []string{"ctr", "nerdctl", "privileged"} {
		t.Run(name, func(t *testing.T) {
			plan, err := Rewrite(input(readSpec(t, "testdata/"+name+".json")))
			if err != nil {
				t.Fatal(err)
			}
			got, err := json.MarshalIndent(plan, "", "\t")
			if err != nil {
				t.Fatal(err)
			}
			golden := filepath.Join("testdata", name+".golden")
			if *update {
				if err := os.WriteFile(golden, append(got, '\n'), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(strings.TrimSpace(string(want)), string(got)); diff != "" {
				t.Errorf("Rewrite(%s.json) (-want +got):\n%s", name, diff)
			}
		})
	}
}

func TestRewriteErrors(t *testing.T) {
	timeout := -1
	tests := []struct {
		name   string
		change func(*specs.Spec)
		kind   error
		want   string
	}{
		{"no process", func(s *specs.Spec) { s.Process = nil }, errdefs.ErrInvalidArgument,
			"process property must not be empty"},
		{"no cwd", func(s *specs.Spec) { s.Process.Cwd = "" }, errdefs.ErrInvalidArgument,
			"Cwd property must not be empty"},
		{"relative cwd", func(s *specs.Spec) { s.Process.Cwd = "tmp" }, errdefs.ErrInvalidArgument,
			"Cwd must be an absolute path"},
		{"no args", func(s *specs.Spec) { s.Process.Args = []string{} }, errdefs.ErrInvalidArgument,
			"args must not be empty"},
		{"NUL in args", func(s *specs.Spec) { s.Process.Args = []string{"a\x00b"} }, errdefs.ErrInvalidArgument,
			"copy spec of container web: a string contains a null byte"},
		{"no root", func(s *specs.Spec) { s.Root = nil }, errdefs.ErrInvalidArgument,
			"root must be specified"},
		{"no linux", func(s *specs.Spec) { s.Linux = nil }, errdefs.ErrInvalidArgument,
			"linux must be specified"},
		{"createContainer hook", func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{CreateContainer: []specs.Hook{{Path: "/usr/bin/mount-hook"}}}
		}, errdefs.ErrNotImplemented,
			"createContainer hook /usr/bin/mount-hook: a program of the host cannot run inside a virtual machine"},
		{"relative hook", func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "/ok"}, {Path: "hook"}}}
		}, errdefs.ErrInvalidArgument, `poststop hook #1: path "hook" is not absolute`},
		{"hook timeout", func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/ok", Timeout: &timeout}}}
		}, errdefs.ErrInvalidArgument, "createRuntime hook #0, /ok: timeout of -1 s: want more than 0"},
		{"seccomp listener", func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{ListenerPath: "/run/notify.sock"}
		}, errdefs.ErrNotImplemented,
			"seccomp listener /run/notify.sock: a listener on the host cannot serve a container in a virtual machine"},
		{"intelRdt", func(s *specs.Spec) { s.Linux.IntelRdt = &specs.LinuxIntelRdt{} }, errdefs.ErrNotImplemented,
			"intelRdt is specified in config, but Intel RDT is not available in a virtual machine"},
		{"netDevices", func(s *specs.Spec) {
			s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"eth1": {}, "eth0": {}}
		}, errdefs.ErrNotImplemented, "network device eth0: devices of the host cannot be moved into a virtual machine"},
		{"propagation", func(s *specs.Spec) { s.Linux.RootfsPropagation = "most" }, errdefs.ErrInvalidArgument,
			"rootfsPropagation=most is not supported"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			plan, err := rewrite(t, tt.change)
			checkError(t, plan, err, tt.kind, tt.want)
		})
	}
}

// checkError checks the kind and the text of an error.
func checkError(t *testing.T, plan *Plan, err, kind error, want string) {
	t.Helper()
	if plan != nil {
		t.Errorf("Rewrite() = %+v beside an error; want nil", plan)
	}
	if !errors.Is(err, kind) || err.Error() != want {
		t.Errorf("Rewrite() error = %v; want %q of kind %v", err, want, kind)
	}
}

func TestInputErrors(t *testing.T) {
	for _, tt := range []struct {
		name string
		in   Input
		want string
	}{
		{"no spec", Input{ID: "web", Bundle: "/b"}, "spec must not be empty"},
		{"relative bundle", Input{ID: "web", Bundle: "b", Spec: &specs.Spec{}},
			`bundle "b" of container web: not an absolute path`},
		{"id with a slash", Input{ID: "../web", Bundle: "/b", Spec: &specs.Spec{}},
			`container id "../web": want at most 76 letters, digits, '.', '_' and '-'`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			plan, err := Rewrite(tt.in)
			checkError(t, plan, err, errdefs.ErrInvalidArgument, tt.want)
		})
	}
}

func TestWarnings(t *testing.T) {
	swappiness, kernel, rt, yes, class := uint64(1), int64(1), uint64(1), true, uint32(1)
	tests := []struct {
		name   string
		change func(*specs.Spec)
		want   []string
	}{
		{"none", func(s *specs.Spec) {
			s.Process.ApparmorProfile = "unconfined"
			s.Windows = &specs.Windows{}
			s.Linux.Resources.HugepageLimits = []specs.LinuxHugepageLimit{{Pagesize: "2MB"}}
			s.Linux.Resources.CPU = &specs.LinuxCPU{Cpus: "0-3", Mems: "0"}
		}, nil},
		{"labels", func(s *specs.Spec) {
			s.Process.ApparmorProfile = "cri-containerd.apparmor.d"
			s.Process.SelinuxLabel = "system_u:system_r:container_t:s0"
			s.Linux.MountLabel = "system_u:object_r:container_file_t:s0"
		}, []string{
			"apparmorProfile cri-containerd.apparmor.d is not applied: the virtual machine has no AppArmor",
			"selinuxLabel system_u:system_r:container_t:s0 is not applied: the virtual machine has no SELinux",
			"mountLabel system_u:object_r:container_file_t:s0 is not applied: the virtual machine has no SELinux",
		}},
		{"topology", func(s *specs.Spec) {
			s.Process.ExecCPUAffinity = &specs.CPUAffinity{Initial: "4-7"}
			s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "1"}
		}, []string{
			"execCPUAffinity is not applied: it names CPUs of the host",
			"memoryPolicy MPOL_BIND is not applied: it names memory nodes of the host",
		}},
		{"cgroup v1 only", func(s *specs.Spec) {
			s.Linux.Resources.Memory = &specs.LinuxMemory{Swappiness: &swappiness, KernelTCP: &kernel, DisableOOMKiller: &yes, UseHierarchy: &yes}
			s.Linux.Resources.CPU = &specs.LinuxCPU{RealtimePeriod: &rt}
			s.Linux.Resources.Network = &specs.LinuxNetwork{ClassID: &class}
		}, []string{
			"kernel memory settings are ignored",
			"memory swappiness is not applied: cgroup v2 has none",
			"disableOOMKiller is not applied: cgroup v2 has no such switch",
			"realtime CPU limits are not applied: cgroup v2 has none",
			"network class and priorities are not applied: cgroup v2 has none",
		}},
		{"devices' limits", func(s *specs.Spec) {
			s.Linux.Resources.Rdma = map[string]specs.LinuxRdma{"mlx5_0": {}}
			s.Linux.Resources.HugepageLimits = []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 1 << 21}}
			s.Linux.Resources.Unified = map[string]string{"io.max": "8:0 rbps=1", "cpuset.cpus": "0"}
		}, []string{
			"unified resource cpuset.cpus is not applied: it is about the host's devices or topology",
			"unified resource io.max is not applied: it is about the host's devices or topology",
			"hugepageLimits: 2MB: the virtual machine has no huge pages to give",
			"rdma is not applied: the virtual machine does not see the host's devices",
		}},
		{"vm section", func(s *specs.Spec) { s.VM = &specs.VM{} }, []string{
			"the spec's vm section is not used: the runtime's configuration sets the virtual machine",
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			plan, err := rewrite(t, tt.change)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, plan.Warnings); diff != "" {
				t.Errorf("Rewrite() warnings (-want +got):\n%s", diff)
			}
		})
	}
}

func TestHooks(t *testing.T) {
	five := 5
	hook := func(p string) []specs.Hook { return []specs.Hook{{Path: p, Timeout: &five}} }
	plan, err := rewrite(t, func(s *specs.Spec) {
		s.Hooks = &specs.Hooks{
			//lint:ignore SA1019 deprecated, and still used
			Prestart:       hook("/pre"),
			CreateRuntime:  hook("/create"),
			StartContainer: hook("/start"),
			Poststart:      hook("/started"),
			Poststop:       hook("/stopped"),
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	host := specs.Hooks{
		//lint:ignore SA1019 deprecated, and still used
		Prestart: hook("/pre"), CreateRuntime: hook("/create"), Poststart: hook("/started"), Poststop: hook("/stopped"),
	}
	if diff := cmp.Diff(host, plan.Hooks); diff != "" {
		t.Errorf("Plan.Hooks (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(&specs.Hooks{StartContainer: hook("/start")}, plan.Spec.Hooks); diff != "" {
		t.Errorf("Plan.Spec.Hooks (-want +got):\n%s", diff)
	}
}

func TestRewriteProcess(t *testing.T) {
	in := &specs.Process{Args: []string{"id"}, Cwd: "/", ApparmorProfile: "x", SelinuxLabel: "y", Env: []string{"A=B"}}
	got, warnings, err := RewriteProcess(in)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&specs.Process{Args: []string{"id"}, Cwd: "/", Env: []string{"A=B"}}, got); diff != "" {
		t.Errorf("RewriteProcess() (-want +got):\n%s", diff)
	}
	if len(warnings) != 2 {
		t.Errorf("RewriteProcess() warnings = %q; want 2", warnings)
	}
	if in.ApparmorProfile != "x" {
		t.Error("RewriteProcess changed its input")
	}
	if _, _, err := RewriteProcess(nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("RewriteProcess(nil) error = %v; want invalid argument", err)
	}
}

func TestRewriteResources(t *testing.T) {
	limit := int64(1 << 26)
	got, warnings, err := RewriteResources(&specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: &limit}, CPU: &specs.LinuxCPU{Cpus: "3"},
	})
	want := &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}, CPU: &specs.LinuxCPU{}}
	if diff := cmp.Diff(want, got); err != nil || warnings != nil || diff != "" {
		t.Errorf("RewriteResources() warnings %q, error %v (-want +got):\n%s", warnings, err, diff)
	}
	for _, tt := range []struct {
		in   *specs.LinuxResources
		want string
	}{
		{nil, "resources must not be empty"},
		{&specs.LinuxResources{Unified: map[string]string{"../x.y": ""}}, `unified resource "../x.y" must be a file name (no slashes)`},
		{&specs.LinuxResources{Unified: map[string]string{"memory": ""}}, `unified resource "memory" must be in the form CONTROLLER.PARAMETER`},
		{&specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{}}}, "device access at 0 field cannot be empty"},
		{&specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Access: "r", Type: "x"}}}, `invalid cgroup device type "x"`},
	} {
		if _, _, err := RewriteResources(tt.in); !errdefs.IsInvalidArgument(err) || err.Error() != tt.want {
			t.Errorf("RewriteResources(%+v) error = %v; want %s", tt.in, err, tt.want)
		}
	}
}

func TestSetSource(t *testing.T) {
	plan, err := rewrite(t, func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/a", Type: "bind", Source: "/srv", Options: []string{"rbind"}})
	})
	if err != nil {
		t.Fatal(err)
	}
	last := &plan.Spec.Mounts[len(plan.Spec.Mounts)-1]
	if want := "/run/vmrt/share/web/mounts/0"; last.Source != want {
		t.Errorf("source = %s; want %s", last.Source, want)
	}
	plan.SetSource(0, "/elsewhere")
	if last.Source != "/elsewhere" {
		t.Errorf("source after SetSource = %s; want /elsewhere", last.Source)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(dir); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "JSON specification file") {
		t.Errorf("Load of an empty bundle: error = %v; want not found", err)
	}
	write := func(b []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "config.json"), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write([]byte(`{"ociVersion": 3}`))
	if _, err := Load(dir); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "ociVersion") {
		t.Errorf("Load of a wrong type: error = %v; want it to name ociVersion", err)
	}
	write(make([]byte, maxLoad+1))
	if _, err := Load(dir); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "more than 16 MiB") {
		t.Errorf("Load of a huge file: error = %v; want it to name the limit", err)
	}
	b, err := json.Marshal(ctrSpec(t))
	if err != nil {
		t.Fatal(err)
	}
	write(b)
	got, err := Load(dir)
	if diff := cmp.Diff(ctrSpec(t), got); err != nil || diff != "" {
		t.Errorf("Load() error %v (-want +got):\n%s", err, diff)
	}
}

// TestHugeSpec rewrites a spec of 10 MB. What makes it large decides whether
// it fits a virtual machine.
func TestHugeSpec(t *testing.T) {
	big := strings.Repeat("x", 10<<20)
	plan, err := rewrite(t, func(s *specs.Spec) { s.Annotations = map[string]string{"a": big} })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Encode(plan.Spec); err != nil {
		t.Errorf("Encode() after dropping 10 MB of annotations: error = %v; want nil", err)
	}
	plan, err = rewrite(t, func(s *specs.Spec) { s.Process.Env = []string{"A=" + big} })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Encode(plan.Spec); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "takes at most") {
		t.Errorf("Encode() of 10 MB of environment: error = %v; want it to name the limit", err)
	}
}

func TestHasNUL(t *testing.T) {
	for in, want := range map[string]bool{
		"":           false,
		"plain":      false,
		"a\x00":      true,
		`a\u0000`:    false, // a backslash, then letters
		`\` + "\x00": true,
		"a\x01":      false,
	} {
		b, err := json.Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		if got := hasNUL(b); got != want {
			t.Errorf("hasNUL(%s) = %t; want %t", b, got, want)
		}
	}
}
