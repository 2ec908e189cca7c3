package kmod_test

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/vmrt/vmrt/guest/kmod"
)

// object returns a relocatable ELF file with nothing but a .modinfo section.
func object(info ...string) []byte {
	const names = "\x00.modinfo\x00.shstrtab\x00"
	data := strings.Join(info, "\x00") + "\x00"
	header := elf.Header64{
		Ident:   [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:    uint16(elf.ET_REL),
		Machine: uint16(elf.EM_X86_64),
		Version: uint32(elf.EV_CURRENT),
		Ehsize:  64, Shentsize: 64, Shnum: 3, Shstrndx: 2,
		Shoff: uint64(64 + len(data) + len(names)),
	}
	var b bytes.Buffer
	for _, v := range []any{
		header, []byte(data), []byte(names),
		elf.Section64{},
		elf.Section64{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: 64, Size: uint64(len(data))},
		elf.Section64{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: uint64(64 + len(data)), Size: uint64(len(names))},
	} {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			panic(err) // fixed-size values into memory
		}
	}
	return b.Bytes()
}

// pack compresses data as the file's name says.
func pack(t *testing.T, file string, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	var w io.WriteCloser
	var err error
	switch filepath.Ext(file) {
	case ".xz":
		w, err = xz.WriterConfig{CheckSum: xz.CRC32}.NewWriter(&b)
	case ".zst":
		w, err = zstd.NewWriter(&b)
	case ".gz":
		w = gzip.NewWriter(&b)
	default:
		return data
	}
	if err == nil {
		_, err = w.Write(data)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// tree writes a modules folder: file names to .modinfo entries.
func tree(t *testing.T, builtin string, files map[string][]string) *kmod.Tree {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "modules.builtin"), []byte(builtin), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, info := range files {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, pack(t, name, object(info...)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := kmod.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// cloud resembles a distribution's kernel, every compression once.
var cloud = map[string][]string{
	"kernel/drivers/virtio/virtio.ko":      {"license=GPL", "depends="},
	"kernel/drivers/virtio/virtio_ring.ko": {"depends=virtio"},
	"kernel/drivers/virtio/virtio_mmio.ko.xz": {
		"description=a driver", "depends=virtio_ring,virtio", "retpoline=Y"},
	"kernel/net/vmw_vsock/vsock.ko.gz":            {"depends="},
	"kernel/net/vmw_vsock/vsock-transport.ko.zst": {"depends=vsock,virtio-ring"},
	"kernel/lib/libcrc32c.ko":                     {"depends=", "softdep=pre: crc32c crc32c-generic post: late"},
	"kernel/crypto/crc32c_generic.ko":             {"depends="},
	"kernel/fs/erofs.ko":                          {"depends=libcrc32c,built_in"},
	"kernel/late.ko":                              {"depends="},
	"kernel/one.ko":                               {"depends=two"},
	"kernel/two.ko":                               {"depends=one"},
	"kernel/a.ko":                                 {"depends=", "softdep=pre: b"},
	"kernel/b.ko":                                 {"depends=a"},
	"kernel/lost.ko":                              {"depends=absent"},
	"kernel/notes.ko.txt.old":                     {"depends="},
}

const builtin = "kernel/fs/built-in.ko\nkernel/drivers/other.ko\n"

func TestResolve(t *testing.T) {
	tr := tree(t, builtin, cloud)
	for _, tc := range []struct {
		name  string
		names []string
		want  []string
	}{
		{"dependencies first", []string{"virtio_mmio"}, []string{"virtio", "virtio_ring", "virtio_mmio"}},
		{"each once", []string{"virtio_ring", "virtio_mmio", "virtio"}, []string{"virtio", "virtio_ring", "virtio_mmio"}},
		{"dash or underscore", []string{"vsock_transport", "virtio-mmio"},
			[]string{"vsock", "virtio", "virtio_ring", "vsock_transport", "virtio_mmio"}},
		{"soft dependency and built in", []string{"erofs"}, []string{"crc32c_generic", "libcrc32c", "erofs"}},
		{"built in", []string{"built_in", "other"}, nil},
		{"wants what needs it", []string{"a", "b"}, []string{"a", "b"}},
		{"nothing", nil, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			mods, err := tr.Resolve(tc.names)
			if err != nil {
				t.Fatalf("Resolve(%q): %v", tc.names, err)
			}
			var got []string
			for _, m := range mods {
				got = append(got, m.Name)
				if !strings.HasSuffix(m.Path, ".ko") || !bytes.HasPrefix(m.Data, []byte(elf.ELFMAG)) {
					t.Errorf("module %s: path %s, data %.4q; want an unpacked .ko", m.Name, m.Path, m.Data)
				}
			}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Errorf("Resolve(%q) (-want +got):\n%s", tc.names, d)
			}
		})
	}
}

func TestResolveRefuses(t *testing.T) {
	tr := tree(t, builtin, cloud)
	for _, tc := range []struct{ module, want string }{
		{"absent", "kernel module absent: the kernel does not have it"},
		{"lost", "kernel module lost: needs absent: the kernel does not have it"},
		{"one", "kernel module one: needs two: needs one: depends on itself"},
	} {
		_, err := tr.Resolve([]string{tc.module})
		if err == nil || err.Error() != tc.want {
			t.Errorf("Resolve(%q) = %v; want %q", tc.module, err, tc.want)
		}
	}
	if _, err := tr.Resolve([]string{"absent"}); !errors.Is(err, kmod.ErrNotFound) {
		t.Errorf("Resolve(absent) = %v; want ErrNotFound", err)
	}
}

func TestHas(t *testing.T) {
	tr := tree(t, builtin, cloud)
	for name, want := range map[string]bool{
		"built-in": true, "built_in": true, "vsock_transport": true, "erofs": true,
		"absent": false, "notes": false, "notes.txt": false,
	} {
		if got := tr.Has(name); got != want {
			t.Errorf("Has(%q) = %t; want %t", name, got, want)
		}
	}
}

func TestDamagedModule(t *testing.T) {
	for name, content := range map[string]string{
		"x.ko":     "not ELF",
		"x.ko.xz":  "not xz",
		"x.ko.gz":  "not gzip",
		"x.ko.zst": "not zstd",
		"x.ko.lz4": "a compression that kernels do not use for modules",
	} {
		dir := t.TempDir()
		for file, s := range map[string]string{"modules.builtin": "", name: content} {
			if err := os.WriteFile(filepath.Join(dir, file), []byte(s), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		tr, err := kmod.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tr.Resolve([]string{"x"}); err == nil || !strings.Contains(err.Error(), "x.ko") {
			t.Errorf("Resolve with damaged %s = %v; want an error that names it", name, err)
		}
	}
}

func TestOpenWithoutModules(t *testing.T) {
	if _, err := kmod.Open(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Open of an empty folder = %v; want os.ErrNotExist", err)
	}
}
