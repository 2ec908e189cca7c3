package initramfs_test

import (
	"bytes"
	"math/rand/v2"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmrt/vmrt/guest/initramfs"
)

// add is one call on an archive.
type add func(*initramfs.Archive) error

var sample = []add{
	func(a *initramfs.Archive) error { return a.File("init", 0o755, []byte("#!x\n")) },
	func(a *initramfs.Archive) error { return a.Dir("tmp", 0o1777) },
	func(a *initramfs.Archive) error { return a.File("/lib/a/b", 0o644, []byte("12345")) },
	func(a *initramfs.Archive) error { return a.File("/lib/a-b", 0o644, nil) },
	func(a *initramfs.Archive) error { return a.Symlink("sbin", "bin") },
	func(a *initramfs.Archive) error { return a.CharDevice("dev/console", 0o600, 5, 1) },
}

var wantSample = []initramfs.Entry{
	{Path: "dev", Mode: 0o040755},
	{Path: "dev/console", Mode: 0o020600, Major: 5, Minor: 1},
	{Path: "init", Mode: 0o100755, Data: []byte("#!x\n")},
	{Path: "lib", Mode: 0o040755},
	{Path: "lib/a", Mode: 0o040755},
	{Path: "lib/a/b", Mode: 0o100644, Data: []byte("12345")},
	{Path: "lib/a-b", Mode: 0o100644},
	{Path: "sbin", Mode: 0o120777, Data: []byte("bin")},
	{Path: "tmp", Mode: 0o041777},
}

func build(t *testing.T, adds []add) []byte {
	t.Helper()
	var a initramfs.Archive
	for i, f := range adds {
		if err := f(&a); err != nil {
			t.Fatalf("add %d: %v", i, err)
		}
	}
	var b bytes.Buffer
	n, err := a.WriteTo(&b)
	if err != nil || n != int64(b.Len()) {
		t.Fatalf("WriteTo = %d, %v; want %d, nil", n, err, b.Len())
	}
	return b.Bytes()
}

func TestReadsBackWhatItWrote(t *testing.T) {
	got, err := initramfs.Read(bytes.NewReader(build(t, sample)))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(wantSample, got); d != "" {
		t.Errorf("entries (-want +got):\n%s", d)
	}
}

func TestSameBytesInAnyOrder(t *testing.T) {
	want := build(t, sample)
	for range 20 {
		shuffled := append([]add(nil), sample...)
		rand.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		if !bytes.Equal(build(t, shuffled), want) {
			t.Fatal("archive depends on the order of the calls")
		}
	}
}

func TestAlignment(t *testing.T) {
	b := build(t, sample)
	if len(b)%512 != 0 {
		t.Errorf("archive has %d bytes; want a multiple of 512", len(b))
	}
	for rest, at := b, 0; ; {
		i := bytes.Index(rest, []byte("070701"))
		if i < 0 {
			break
		}
		if (at+i)%4 != 0 {
			t.Errorf("header at byte %d; want a multiple of 4", at+i)
		}
		at += i + 6
		rest = rest[i+6:]
	}
}

func TestRefuses(t *testing.T) {
	for _, tc := range []struct {
		name string
		adds []add
		want string
	}{
		{"root", []add{func(a *initramfs.Archive) error { return a.Dir("/", 0o755) }}, "not a path"},
		{"outside", []add{func(a *initramfs.Archive) error { return a.File("../x", 0o644, nil) }}, "not a path"},
		{"trailer", []add{func(a *initramfs.Archive) error { return a.File("TRAILER!!!", 0o644, nil) }}, "not a path"},
		{"twice", []add{sample[0], sample[0]}, "there already"},
		{"below a file", []add{sample[0], func(a *initramfs.Archive) error { return a.Dir("init/x", 0o755) }}, "not a folder"},
		{"over a folder", []add{sample[1], func(a *initramfs.Archive) error { return a.File("tmp", 0o644, nil) }}, "there already"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var a initramfs.Archive
			var err error
			for _, f := range tc.adds {
				err = f(&a)
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("add = %v; want an error with %q", err, tc.want)
			}
		})
	}
}

func TestReadRefusesDamage(t *testing.T) {
	whole := build(t, sample)
	for n := range len(whole) - 512 {
		if _, err := initramfs.Read(bytes.NewReader(whole[:n])); err == nil {
			t.Fatalf("Read of the first %d of %d bytes = nil; want an error", n, len(whole))
		}
	}
	for _, tc := range []struct {
		name string
		at   int
		with string
	}{
		{"magic", 0, "070702"},
		{"digits", 6, "0000000g"},
		{"huge file", 6 + 6*8, "ffffffff"},
		{"huge name", 6 + 11*8, "ffffffff"},
		{"no name", 6 + 11*8, "00000000"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := bytes.Clone(whole)
			copy(b[tc.at:], tc.with)
			if _, err := initramfs.Read(bytes.NewReader(b)); err == nil {
				t.Error("Read = nil; want an error")
			}
		})
	}
}

func TestCpioAgrees(t *testing.T) {
	cpio, err := exec.LookPath("cpio")
	if err != nil {
		t.Skip("cpio is not installed")
	}
	cmd := exec.Command(cpio, "-t", "--quiet")
	cmd.Stdin = bytes.NewReader(build(t, sample))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("cpio -t: %v: %s", err, out)
	}
	var want []string
	for _, e := range wantSample {
		want = append(want, e.Path)
	}
	if d := cmp.Diff(want, strings.Fields(string(out))); d != "" {
		t.Errorf("cpio -t (-want +got):\n%s", d)
	}
}

func FuzzRead(f *testing.F) {
	var a initramfs.Archive
	for _, s := range sample {
		if err := s(&a); err != nil {
			f.Fatal(err)
		}
	}
	var b bytes.Buffer
	if _, err := a.WriteTo(&b); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		entries, err := initramfs.Read(bytes.NewReader(data))
		if err == nil && len(entries)*110 > len(data) {
			t.Errorf("%d entries in %d bytes", len(entries), len(data))
		}
	})
}
