package qemu_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmrt/vmrt/pkg/hypervisor/qemu"
)

// countingBinary returns a QEMU that is only good for its version, and a
// function that says how often it ran.
func countingBinary(t *testing.T, body string) (path string, runs func() int) {
	t.Helper()
	dir := t.TempDir()
	path = filepath.Join(dir, "qemu")
	log := filepath.Join(dir, "log")
	writeScript(t, path, "echo run >>"+log+"\n"+body)
	return path, func() int {
		b, err := os.ReadFile(log)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		return strings.Count(string(b), "run")
	}
}

func TestIdentify(t *testing.T) {
	path, runs := countingBinary(t, "echo 'QEMU emulator version 9.1.2'")
	dir := t.TempDir()
	want := qemu.Binary{Path: path, Version: qemu.Version{Major: 9, Minor: 1, Micro: 2}, Sandbox: true}
	for range 3 {
		if got, err := qemu.Identify(context.Background(), path, dir); err != nil || got != want {
			t.Errorf("Identify() = %+v, %v; want %+v", got, err, want)
		}
	}
	if n := runs(); n != 1 {
		t.Errorf("the binary ran %d times; want once", n)
	}
	// An upgrade changes the file.
	writeScript(t, path, "echo 'QEMU emulator version 10.0.0'")
	if err := os.Chtimes(path, time.Time{}, time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if got, err := qemu.Identify(context.Background(), path, dir); err != nil || got.Version.Major != 10 {
		t.Errorf("Identify() after an upgrade = %+v, %v; want version 10", got, err)
	}
}

func TestIdentifyWithoutSandbox(t *testing.T) {
	path, runs := countingBinary(t, `case "$1" in -sandbox) echo "no sandbox" >&2; exit 1;; esac; echo 'QEMU emulator version 7.2.0'`)
	dir := t.TempDir()
	for range 2 {
		if got, err := qemu.Identify(context.Background(), path, dir); err != nil || got.Sandbox {
			t.Errorf("Identify() = %+v, %v; want no sandbox", got, err)
		}
	}
	if n := runs(); n != 2 {
		t.Errorf("the binary ran %d times; want twice, both for the first call", n)
	}
}

// TestIdentifyWithoutCache: a cache that cannot be written costs time only.
func TestIdentifyWithoutCache(t *testing.T) {
	path, runs := countingBinary(t, "echo 'QEMU emulator version 9.1.2'")
	for range 2 {
		if _, err := qemu.Identify(context.Background(), path, "/proc/none"); err != nil {
			t.Errorf("Identify() = %v", err)
		}
	}
	if n := runs(); n != 2 {
		t.Errorf("the binary ran %d times; want twice", n)
	}
}

func TestIdentifyEndsWithItsContext(t *testing.T) {
	path, _ := countingBinary(t, "exec sleep 60")
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := qemu.Identify(ctx, path, t.TempDir()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Identify() = %v; want a deadline error", err)
	}
	if d := time.Since(start); d > 10*time.Second {
		t.Errorf("Identify() took %v", d)
	}
}

func TestIntegrationIdentify(t *testing.T) {
	got, err := qemu.Identify(context.Background(), qemuBinary(t), t.TempDir())
	if err != nil {
		t.Fatalf("Identify() = %v", err)
	}
	t.Logf("%+v", got)
}
