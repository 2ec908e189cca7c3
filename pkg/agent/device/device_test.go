package device

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/vmrt/vmrt/api"
)

func TestList(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to make device nodes")
	}
	dir := t.TempDir()
	for _, d := range []string{"net", "pts"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range []struct {
		name string
		mode uint32
		dev  uint64
	}{
		{"null", unix.S_IFCHR | 0o666, unix.Mkdev(1, 3)},
		{"net/tun", unix.S_IFCHR | 0o600, unix.Mkdev(10, 200)},
		{"sda", unix.S_IFBLK | 0o660, unix.Mkdev(8, 0)},
		{"pts/0", unix.S_IFCHR | 0o620, unix.Mkdev(136, 0)},
		{"fifo", unix.S_IFIFO | 0o600, 0},
	} {
		path := filepath.Join(dir, n.name)
		if err := unix.Mknod(path, n.mode, int(n.dev)); err != nil {
			t.Skipf("make device nodes: %v", err)
		}
		if err := os.Chmod(path, os.FileMode(n.mode&0o777)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("null", filepath.Join(dir, "zero")); err != nil {
		t.Fatal(err)
	}
	got, err := List(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := []*api.Device{
		{Path: dir + "/net/tun", Type: "c", Major: 10, Minor: 200, Mode: 0o600},
		{Path: dir + "/null", Type: "c", Major: 1, Minor: 3, Mode: 0o666},
		{Path: dir + "/sda", Type: "b", Major: 8, Mode: 0o660},
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("List() (-want +got):\n%s", diff)
	}
}

func TestListOfNothing(t *testing.T) {
	if _, err := List(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("List() of a missing folder = nil; want an error")
	}
}
