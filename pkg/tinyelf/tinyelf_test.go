//go:build linux

package tinyelf

import (
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// checkELF has an independent reader look at the file.
func checkELF(t *testing.T, path string, machine elf.Machine) {
	t.Helper()
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Type != elf.ET_EXEC || f.Machine != machine || len(f.Progs) != 2 {
		t.Fatalf("file type %v, machine %v, %d segments; want %v, %v, 2", f.Type, f.Machine, len(f.Progs), elf.ET_EXEC, machine)
	}
	load, stack := f.Progs[0], f.Progs[1]
	if load.Type != elf.PT_LOAD || load.Flags != elf.PF_R|elf.PF_X || load.Vaddr%load.Align != load.Off%load.Align {
		t.Errorf("first segment = %+v; want it loaded read-only and aligned", load.ProgHeader)
	}
	if stack.Type != elf.PT_GNU_STACK || stack.Flags != elf.PF_R|elf.PF_W {
		t.Errorf("second segment = %+v; want a stack without code", stack.ProgHeader)
	}
	if fi, err := os.Stat(path); err != nil || uint64(fi.Size()) != load.Filesz || load.Filesz != load.Memsz {
		t.Errorf("segment of %d bytes, %d in memory, in a file of %v; want all equal", load.Filesz, load.Memsz, fi.Size())
	}
	if f.Entry < load.Vaddr+dataOff || f.Entry >= load.Vaddr+load.Memsz {
		t.Errorf("entry = %#x; want it in the code", f.Entry)
	}
}

// count writes its data once for each step of a loop, and exits with 7.
func count(p *Program) int {
	fail := p.Pos()
	p.Call(p.Syscalls.Exit, 1)
	entry := p.Pos()
	p.ClearCounter()
	loop := p.Pos()
	p.Call(p.Syscalls.Write, 1, DataAddr, 3)
	p.JumpIfBelow(3, fail)
	p.CountTo(4, loop)
	p.Call(p.Syscalls.Exit, 7)
	return entry
}

func TestLink(t *testing.T) {
	machines := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}
	for _, arch := range Architectures() {
		for _, data := range []string{"", "abc", "12345678"} {
			b, err := LinkFor(arch, []byte(data), count)
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(t.TempDir(), "elf")
			if err := os.WriteFile(file, b, 0o755); err != nil {
				t.Fatal(err)
			}
			checkELF(t, file, machines[arch])
			if len(b)%4 != 0 && arch == "arm64" {
				t.Errorf("%s with %d bytes of data: code is not aligned", arch, len(data))
			}
		}
	}
}

func TestRun(t *testing.T) {
	b, err := Link([]byte("abc"), count)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := Memfd("count", b)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	cmd := exec.Command("count")
	cmd.Path, cmd.Err = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd), nil
	out, err := cmd.Output()
	if got := cmd.ProcessState.ExitCode(); got != 7 || string(out) != "abcabcabcabc" {
		t.Errorf("program on %s = %q, status %d (%v); want abc four times, status 7", runtime.GOARCH, out, got, err)
	}
}

func TestUnknownArchitecture(t *testing.T) {
	if _, err := LinkFor("pdp11", nil, count); err == nil {
		t.Error("LinkFor(pdp11) = nil; want an error")
	}
}
