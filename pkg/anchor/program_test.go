//go:build linux

package anchor

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

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
