package boot

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSealRuntime(t *testing.T) {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "crun")
	if err := os.WriteFile(path, self, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := sealRuntime(path); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(path, "-test.list", "^TestSealRuntime$").Output()
	if err != nil || !bytes.HasPrefix(out, []byte("TestSealRuntime\n")) {
		t.Errorf("the sealed program = %q, %v; want that it runs", out, err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0); err != nil || got != seals {
		t.Errorf("seals = %#x, %v; want exactly %#x, by which crun knows it", got, err, seals)
	}
	if _, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0); err == nil {
		t.Error("the sealed program could be truncated")
	}
	w, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil {
		_, err = w.Write([]byte("x"))
		w.Close()
	}
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ETXTBSY) {
		t.Errorf("write to the sealed program: %v; want that it is not allowed", err)
	}
}

func TestSealRuntimeErrors(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "crun")
	if err := sealRuntime(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("sealRuntime of a missing file = %v; want that it does not exist", err)
	}
	// In the way of the link.
	if err := errors.Join(os.WriteFile(path, []byte("x"), 0o755), os.Mkdir(path+".sealed", 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := sealRuntime(path); err == nil {
		t.Error("sealRuntime without a place for its link = nil; want an error")
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "x" {
		t.Errorf("after an error the runtime is %q, %v; want it as it was", b, err)
	}
}
