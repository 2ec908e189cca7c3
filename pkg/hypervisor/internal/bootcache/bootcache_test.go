package bootcache

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

type fact struct{ N int }

func TestStoreThenLoad(t *testing.T) {
	if _, err := bootID(); err != nil {
		t.Skipf("no boot id: %v", err)
	}
	path := filepath.Join(t.TempDir(), "run", "fact.json")
	if err := Store(path, "key", fact{N: 42}); err != nil {
		t.Fatalf("Store() = %v", err)
	}
	var got fact
	if err := Load(path, "key", &got); err != nil || got.N != 42 {
		t.Errorf("Load() = %v, value %+v; want nil, 42", err, got)
	}
	fi, err := os.Stat(path)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode of %s = %v, %v; want 0600", path, fi.Mode(), err)
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(path), ".*"))
	if err != nil || len(left) != 0 {
		t.Errorf("temporary files left: %v, %v", left, err)
	}
}

func TestLoadMisses(t *testing.T) {
	good := func(t *testing.T, path string) {
		if err := store(path, "this boot", "key", fact{N: 42}); err != nil {
			t.Fatal(err)
		}
	}
	write := func(content string) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	tests := map[string]struct {
		prepare func(t *testing.T, path string)
		boot    string
		key     string
	}{
		"absent":         {prepare: func(*testing.T, string) {}},
		"empty":          {prepare: write("")},
		"garbage":        {prepare: write("\x00\xff{{{")},
		"truncated":      {prepare: write(`{"boot_id":"this boot","key":"key","value":{"N":4`)},
		"no value":       {prepare: write(`{"boot_id":"this boot","key":"key"}`)},
		"wrong type":     {prepare: write(`{"boot_id":"this boot","key":"key","value":{"N":"x"}}`)},
		"too large":      {prepare: write(strings.Repeat(" ", maxSize+1) + `{}`)},
		"another boot":   {prepare: good, boot: "next boot"},
		"another key":    {prepare: good, key: "other"},
		"world-writable": {prepare: func(t *testing.T, p string) { good(t, p); chmod(t, p, 0o602) }},
		"group-writable": {prepare: func(t *testing.T, p string) { good(t, p); chmod(t, p, 0o620) }},
		"symbolic link": {prepare: func(t *testing.T, p string) {
			good(t, p+".real")
			if err := os.Symlink(p+".real", p); err != nil {
				t.Fatal(err)
			}
		}},
		"directory": {prepare: func(t *testing.T, p string) {
			if err := os.Mkdir(p, 0o700); err != nil {
				t.Fatal(err)
			}
		}},
		"named pipe": {prepare: func(t *testing.T, p string) {
			if err := syscall.Mkfifo(p, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		"another user's": {prepare: func(t *testing.T, p string) {
			if os.Geteuid() != 0 {
				t.Skip("needs root to give a file away")
			}
			good(t, p)
			if err := os.Chown(p, 65534, 65534); err != nil {
				t.Fatal(err)
			}
		}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "fact.json")
			tt.prepare(t, path)
			boot, key := "this boot", "key"
			if tt.boot != "" {
				boot = tt.boot
			}
			if tt.key != "" {
				key = tt.key
			}
			var got fact
			done := make(chan error, 1)
			go func() { done <- load(path, boot, key, &got) }()
			select {
			case err := <-done:
				if err == nil {
					t.Errorf("load() = nil, value %+v; want an error", got)
				}
			case <-time.After(10 * time.Second):
				t.Fatal("load() did not return")
			}
		})
	}
}

func TestStoreReplacesWhatItCannotRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fact.json")
	if err := os.WriteFile(path, []byte("garbage"), 0o666); err != nil {
		t.Fatal(err)
	}
	chmod(t, path, 0o666)
	if err := store(path, "boot", "key", fact{N: 1}); err != nil {
		t.Fatalf("store() = %v", err)
	}
	var got fact
	if err := load(path, "boot", "key", &got); err != nil || got.N != 1 {
		t.Errorf("load() = %v, value %+v; want nil, 1", err, got)
	}
}

func TestConcurrentWriters(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fact.json")
	if err := store(path, "boot", "key", fact{N: 7}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				if err := store(path, "boot", "key", fact{N: 7}); err != nil {
					t.Errorf("store() = %v", err)
				}
				var got fact
				if err := load(path, "boot", "key", &got); err != nil || got.N != 7 {
					t.Errorf("load() = %v, value %+v; want nil, 7", err, got)
				}
			}
		})
	}
	wg.Wait()
}

func TestStoreSaysWhatItCannotWrite(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := store(filepath.Join(file, "fact.json"), "boot", "key", fact{}); err == nil {
		t.Error("store() below a file = nil; want an error")
	}
}

func chmod(t *testing.T, path string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}
