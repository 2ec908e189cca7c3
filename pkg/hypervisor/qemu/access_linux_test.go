package qemu

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

func TestPermits(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to give a file away")
	}
	path := filepath.Join(t.TempDir(), "device")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(path, 100, 200); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		mode os.FileMode
		c    syscall.Credential
		want bool
	}{
		{"root", 0o000, syscall.Credential{}, true},
		{"owner", 0o600, syscall.Credential{Uid: 100}, true},
		{"owner without a right that others have", 0o066, syscall.Credential{Uid: 100}, false},
		{"group", 0o060, syscall.Credential{Uid: 1, Gid: 200}, true},
		{"further group", 0o060, syscall.Credential{Uid: 1, Gid: 1, Groups: []uint32{2, 200}}, true},
		{"group that may only read", 0o046, syscall.Credential{Uid: 1, Gid: 200}, false},
		{"others", 0o006, syscall.Credential{Uid: 1, Gid: 1}, true},
		{"others without a right", 0o660, syscall.Credential{Uid: 1, Gid: 1}, false},
	}
	for _, tt := range tests {
		if err := os.Chmod(path, tt.mode); err != nil {
			t.Fatal(err)
		}
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := permits(fi, &tt.c, 6); got != tt.want {
			t.Errorf("%s: permits(%v, %+v, 6) = %v; want %v", tt.name, tt.mode, tt.c, got, tt.want)
		}
	}
}
