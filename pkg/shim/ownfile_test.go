package shim

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

func TestCleanMappings(t *testing.T) {
	const smaps = `00400000-00c6c000 r-xp 00000000 fd:00 42   /usr/bin/a program
Rss:                8624 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
00c6c000-014a0000 r--p 0086c000 fd:00 42   /usr/bin/a program
Anonymous:             4 kB
014a0000-014e0000 rw-p 010a0000 fd:00 42   /usr/bin/a program
Anonymous:             0 kB
014e0000-01500000 r--p 010e0000 fd:00 42   /usr/bin/a program
Anonymous:             0 kB
7f0000000000-7f0000001000 r--p 00000000 fd:00 43   /usr/bin/another
Anonymous:             0 kB
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0
Anonymous:            12 kB
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0   [vsyscall]
Anonymous:             0 kB
`
	got, err := cleanMappings(strings.NewReader(smaps), "/usr/bin/a program")
	want := []mapping{{0x400000, 0xc6c000}, {0x14e0000, 0x1500000}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("cleanMappings() = %x, %v; want %x", got, err, want)
	}
	if got, err := cleanMappings(strings.NewReader("nonsense here\n"), "x"); err == nil {
		t.Errorf("cleanMappings() of nonsense = %x; want an error", got)
	}
}

func TestUnmapOwnFile(t *testing.T) {
	resident := func() (kib int) {
		b, err := os.ReadFile("/proc/self/status")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if _, err := fmt.Sscanf(line, "RssFile: %d kB", &kib); err == nil {
				return kib
			}
		}
		t.Fatal("no RssFile in /proc/self/status")
		return 0
	}
	mapAll(t)
	before := resident()
	if err := unmapOwnFile(); err != nil {
		t.Fatal(err)
	}
	if after := resident(); after > before/2 {
		t.Errorf("%d KiB of files are mapped, %d before; want less than half", after, before)
	}
}

// mapAll maps the whole program, as a look at its memory does.
func mapAll(t *testing.T) {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mappings, err := cleanMappings(f, exe)
	if err != nil || len(mappings) == 0 {
		t.Fatalf("cleanMappings() = %v, %v; want some", mappings, err)
	}
	memory, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	for _, m := range mappings {
		if _, err := memory.ReadAt(make([]byte, m.end-m.start), int64(m.start)); err != nil {
			t.Fatal(err)
		}
	}
}
