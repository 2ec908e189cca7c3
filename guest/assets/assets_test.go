package assets_test

import (
	"bytes"
	"debug/elf"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/guest/assets"
	"github.com/vmrt/vmrt/guest/initramfs"
)

// write makes a file and the folders above it.
func write(t *testing.T, file string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// program returns the head of an ELF program; with an interpreter it is what a
// dynamically linked one has.
func program(interp bool) []byte {
	b := make([]byte, 64+56)
	copy(b, elf.ELFMAG)
	b[elf.EI_CLASS], b[elf.EI_DATA], b[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)
	b[16], b[18], b[20] = byte(elf.ET_EXEC), byte(elf.EM_X86_64), byte(elf.EV_CURRENT)
	b[32] = 64                      // program headers follow
	b[52], b[54], b[56] = 64, 56, 1 // sizes, and one of them
	b[64] = byte(elf.PT_LOAD)
	if interp {
		b[64] = byte(elf.PT_INTERP)
	}
	return b
}

// inputs makes a kernel folder without modules, an agent and a runtime.
func inputs(t *testing.T) assets.Spec {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "k/vmlinux"), []byte("a kernel"))
	write(t, filepath.Join(dir, "k/release"), []byte("6.12.1-vmrt\n"))
	write(t, filepath.Join(dir, "k/version"), []byte("6.12.1-1\n"))
	write(t, filepath.Join(dir, "agent"), program(false))
	write(t, filepath.Join(dir, "crun"), program(false))
	return assets.Spec{
		Kind: guest.Tuned, KernelDir: filepath.Join(dir, "k"), Out: filepath.Join(dir, "out"),
		Agent: filepath.Join(dir, "agent"), AgentVersion: "1.2",
		Runtime: filepath.Join(dir, "crun"), RuntimeVersion: "crun 1.21",
	}
}

func read(t *testing.T, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestBuild(t *testing.T) {
	s := inputs(t)
	m, err := assets.Build(s)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := m.String(), "tuned kernel 6.12.1-vmrt (6.12.1-1), agent 1.2, crun 1.21"; got != want {
		t.Errorf("manifest = %q; want %q", got, want)
	}
	loaded, err := guest.Load(s.Out)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(m, loaded); d != "" {
		t.Errorf("manifest that was read back (-built +read):\n%s", d)
	}
	for _, name := range []string{guest.KernelFile, guest.InitramfsFile, guest.ManifestFile} {
		info, err := os.Stat(filepath.Join(s.Out, name))
		if err != nil || info.Mode() != 0o644 {
			t.Errorf("%s: mode %v, %v; want a world-readable file", name, info.Mode(), err)
		}
	}
	if got := read(t, filepath.Join(s.Out, guest.KernelFile)); string(got) != "a kernel" {
		t.Errorf("kernel = %q; want a copy", got)
	}
	entries, err := initramfs.Read(bytes.NewReader(read(t, filepath.Join(s.Out, guest.InitramfsFile))))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Path)
	}
	want := []string{"bin", "bin/crun", "dev", "dev/console", "etc", "init", "proc", "run", "sys", "tmp"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("initramfs (-want +got):\n%s", d)
	}
}

func TestBuildAgain(t *testing.T) {
	s := inputs(t)
	first, err := assets.Build(s)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(s.Out, guest.InitramfsFile)
	bytesBefore, statBefore := read(t, file), stat(t, file)

	again, err := assets.Build(s)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(first, again); d != "" || !bytes.Equal(bytesBefore, read(t, file)) {
		t.Errorf("same inputs, other files:\n%s", d)
	}
	if !os.SameFile(statBefore, stat(t, file)) {
		t.Error("an equal file was replaced")
	}

	// A virtual machine may have the old file mapped: another one takes its
	// place.
	write(t, s.Agent, append(program(false), "new"...))
	if _, err := assets.Build(s); err != nil {
		t.Fatal(err)
	}
	if os.SameFile(statBefore, stat(t, file)) {
		t.Error("a changed file was written in place")
	}
	left, err := filepath.Glob(filepath.Join(s.Out, ".*"))
	if err != nil || len(left) != 0 {
		t.Errorf("temporary files %q, %v; want none", left, err)
	}
}

func stat(t *testing.T, file string) os.FileInfo {
	t.Helper()
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	return info
}

func TestBuildRefuses(t *testing.T) {
	for _, tc := range []struct {
		name   string
		damage func(t *testing.T, s *assets.Spec)
		want   string
	}{
		{"kind", func(_ *testing.T, s *assets.Spec) { s.Kind = "fast" }, `kernel kind "fast"`},
		{"no kernel", func(_ *testing.T, s *assets.Spec) { s.KernelDir += "/none" }, "no such file"},
		{"no release", func(t *testing.T, s *assets.Spec) { write(t, s.KernelDir+"/release", nil) }, "release: empty"},
		{"no agent", func(_ *testing.T, s *assets.Spec) { s.Agent += ".none" }, "no such file"},
		{"dynamic agent", func(t *testing.T, s *assets.Spec) { write(t, s.Agent, program(true)) }, "not statically linked"},
		{"script for a runtime", func(t *testing.T, s *assets.Spec) { write(t, s.Runtime, bytes.Repeat([]byte("#!/bin/sh\n"), 100)) }, "bad magic"},
		{"modules missing", func(t *testing.T, s *assets.Spec) {
			write(t, s.KernelDir+"/lib/modules/6.12.1-vmrt/modules.builtin", []byte("kernel/virtio_mmio.ko\n"))
		}, "the kernel does not have it"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := inputs(t)
			tc.damage(t, &s)
			_, err := assets.Build(s)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Build = %v; want an error with %q", err, tc.want)
			}
			if _, err := os.Stat(filepath.Join(s.Out, guest.ManifestFile)); err == nil {
				t.Error("a manifest was written")
			}
		})
	}
}

// TestStockInitramfs looks at the real one: every module that the lists name
// is there, once, and each list is in load order.
func TestStockInitramfs(t *testing.T) {
	file := filepath.Join("../../bin/guest", guest.Stock, guest.InitramfsFile)
	f, err := os.Open(file)
	if err != nil {
		t.Skipf("%s is not built: make initramfs", file)
	}
	defer f.Close()
	entries, err := initramfs.Read(f)
	if err != nil {
		t.Fatal(err)
	}
	contents := make(map[string]string)
	for _, e := range entries {
		contents["/"+e.Path] = string(e.Data)
	}
	listed := strings.Fields(contents["/"+assets.BootList] + contents["/"+assets.LateList])
	for i, p := range listed {
		if contents[p] == "" {
			t.Errorf("%s is listed and missing", p)
		}
		if slices.Contains(listed[:i], p) {
			t.Errorf("%s is listed twice", p)
		}
	}
	boot := contents["/"+assets.BootList]
	for _, pair := range [][2]string{{"vsock.ko", "vmw_vsock_virtio_transport.ko"}, {"scsi_mod.ko", "sd_mod.ko"}} {
		first, second := strings.Index(boot, "/"+pair[0]), strings.Index(boot, "/"+pair[1])
		if second < 0 || first > second {
			t.Errorf("boot list has %s at %d and %s at %d; want the first before the second", pair[0], first, pair[1], second)
		}
	}
}
