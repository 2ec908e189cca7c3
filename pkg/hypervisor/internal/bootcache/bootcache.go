// Package bootcache keeps facts about the host, which cost something to find
// out, in small files that are valid until the next boot.
//
// A file that is missing, from another boot, stored under another key,
// corrupted, another user's, or writable by others is a miss and never a wrong
// answer. Files are replaced atomically; of concurrent
// writers the last one wins. Nothing is locked: two processes may find out the
// same fact at the same time.
package bootcache

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// maxSize bounds what is read of a cache file.
const maxSize = 64 << 10

// entry is the format of a cache file.
type entry struct {
	BootID string          `json:"boot_id"`
	Key    string          `json:"key"`
	Value  json.RawMessage `json:"value"`
}

// Load reads the value that Store kept in the file at path under key since the
// machine booted. The error says why there is none.
func Load(path, key string, value any) error {
	id, err := bootID()
	if err != nil {
		return err
	}
	return load(path, id, key, value)
}

// Store keeps value in the file at path under key. It makes the folder of path
// if need be.
func Store(path, key string, value any) error {
	id, err := bootID()
	if err != nil {
		return err
	}
	return store(path, id, key, value)
}

// bootID returns the kernel's random name of this boot.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	id := strings.TrimSpace(string(b))
	if id == "" {
		return "", errors.New("the kernel's boot id is empty")
	}
	return id, nil
}

func load(path, bootID, key string, value any) error {
	b, err := readPrivate(path)
	if err != nil {
		return err
	}
	var e entry
	switch err := json.Unmarshal(b, &e); {
	case err != nil:
		return fmt.Errorf("decode %s: %w", path, err)
	case e.BootID != bootID:
		return fmt.Errorf("%s is from another boot", path)
	case e.Key != key:
		return fmt.Errorf("%s is about something else", path)
	}
	if err := json.Unmarshal(e.Value, value); err != nil {
		return fmt.Errorf("decode %s: %w", path, err)
	}
	return nil
}

func store(path, bootID, key string, value any) (err error) {
	v, err := json.Marshal(value)
	if err != nil {
		return err
	}
	b, err := json.Marshal(entry{BootID: bootID, Key: key, Value: v})
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+"-") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	if _, err := f.Write(append(b, '\n')); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// readPrivate reads a small regular file that nobody else could have written.
func readPrivate(path string) ([]byte, error) {
	// Without O_NONBLOCK a named pipe would block the open.
	f, err := os.OpenFile(path, os.O_RDONLY|noFollow|nonBlock, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !fi.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file", path)
	case fi.Mode().Perm()&0o022 != 0:
		return nil, fmt.Errorf("%s is writable by others", path)
	case !ownedByUs(fi):
		return nil, fmt.Errorf("%s belongs to another user", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err == nil && len(b) > maxSize {
		err = fmt.Errorf("%s is larger than %d bytes", path, maxSize)
	}
	return b, err
}
