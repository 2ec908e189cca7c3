//go:build linux

package anchor

import (
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// checkELF has an independent reader look at the file.
func checkELF(t *testing.T, path string, tg target) {
	t.Helper()
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Type != elf.ET_EXEC || f.Machine != elf.Machine(tg.machine) || len(f.Progs) != 2 {
		t.Fatalf("file type %v, machine %v, %d segments; want %v, %v, 2", f.Type, f.Machine, len(f.Progs), elf.ET_EXEC, elf.Machine(tg.machine))
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
	if f.Entry < load.Vaddr+codeOff || f.Entry >= load.Vaddr+load.Memsz {
		t.Errorf("entry = %#x; want it in the code", f.Entry)
	}
}

// runProgram runs the program by itself, with input as all that it can read.
func runProgram(t *testing.T, exe *os.File, input string, creds *syscall.Credential) (*os.ProcessState, string) {
	t.Helper()
	var out strings.Builder
	cmd := exec.Command("anchor")
	cmd.Path, cmd.Err = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), exe.Fd()), nil
	cmd.Stdin, cmd.Stdout = strings.NewReader(input), &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if creds != nil {
		// Already without privileges: a file that it may execute.
		dir := t.TempDir()
		b, err := program()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Path = dir + "/anchor"
		if err := os.WriteFile(cmd.Path, b, 0o755); err != nil {
			t.Fatal(err)
		}
		for d := dir; d != os.TempDir() && d != "/"; d = d[:strings.LastIndex(d, "/")] {
			if err := os.Chmod(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		cmd.SysProcAttr.Credential = creds
	}
	err := cmd.Run()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return cmd.ProcessState, out.String()
}
