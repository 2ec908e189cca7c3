// Package initramfs writes and reads the cpio archives that Linux unpacks into
// its first root file system ("newc" format, see the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst).
//
// The same entries give the same bytes: entries are sorted by path, inode
// numbers are counted, and times and owners are zero. Hard links are not
// supported; equal files are stored twice. An Archive is not safe for
// concurrent use.
package initramfs

import (
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
)

// File types as they stand in the mode field, from stat(2).
const (
	typeMask    = 0o170000
	typeDir     = 0o040000
	typeRegular = 0o100000
	typeLink    = 0o120000
	typeChar    = 0o020000
)

// Entry is one file of an archive.
type Entry struct {
	// Path has no leading slash.
	Path string
	// Mode holds the file type and the permission bits, as stat(2) does.
	Mode uint32
	// Data is a regular file's content or a symbolic link's target.
	Data []byte
	// Major and Minor are a device node's numbers.
	Major, Minor uint32
}

// IsDir reports whether the entry is a folder.
func (e *Entry) IsDir() bool { return e.Mode&typeMask == typeDir }

// Archive collects entries. Its zero value is empty and ready for use.
type Archive struct {
	entries map[string]Entry
}

// Dir adds a folder. Folders above any entry are added by themselves, with
// mode 0755; calling Dir sets another one.
func (a *Archive) Dir(name string, perm uint32) error {
	return a.add(Entry{Path: name, Mode: typeDir | perm})
}

// File adds a regular file. The archive keeps data until it is written.
func (a *Archive) File(name string, perm uint32, data []byte) error {
	return a.add(Entry{Path: name, Mode: typeRegular | perm, Data: data})
}

// Symlink adds a symbolic link to target.
func (a *Archive) Symlink(name, target string) error {
	return a.add(Entry{Path: name, Mode: typeLink | 0o777, Data: []byte(target)})
}

// CharDevice adds a character device node.
func (a *Archive) CharDevice(name string, perm, major, minor uint32) error {
	return a.add(Entry{Path: name, Mode: typeChar | perm, Major: major, Minor: minor})
}

func (a *Archive) add(e Entry) error {
	p := strings.TrimPrefix(path.Clean(e.Path), "/")
	if p == "" || p == "." || p == ".." || strings.HasPrefix(p, "../") || p == trailer {
		return fmt.Errorf("add %q to the initramfs: not a path below the root", e.Path)
	}
	if uint64(len(e.Data)) > maxField || len(p)+1 > maxName {
		return fmt.Errorf("add %s to the initramfs: too large for the cpio format", p)
	}
	e.Path = p
	if old, ok := a.entries[p]; ok && (!old.IsDir() || !e.IsDir()) {
		return fmt.Errorf("add %s to the initramfs: there already", p)
	}
	for up := path.Dir(p); up != "."; up = path.Dir(up) {
		if above, ok := a.entries[up]; ok && !above.IsDir() {
			return fmt.Errorf("add %s to the initramfs: %s is not a folder", p, up)
		}
	}
	if a.entries == nil {
		a.entries = make(map[string]Entry)
	}
	for up := path.Dir(p); up != "."; up = path.Dir(up) {
		if _, ok := a.entries[up]; !ok {
			a.entries[up] = Entry{Path: up, Mode: typeDir | 0o755}
		}
	}
	a.entries[p] = e
	return nil
}

// Entries returns what the archive holds, in the order in which it is written:
// every folder before what is in it.
func (a *Archive) Entries() []Entry {
	// "/" must sort before every other byte, or "a-b" would come between
	// "a" and "a/c", which is legal but surprising.
	return slices.SortedFunc(maps.Values(a.entries), func(x, y Entry) int {
		return slices.Compare(strings.Split(x.Path, "/"), strings.Split(y.Path, "/"))
	})
}

// WriteTo writes the archive, uncompressed.
func (a *Archive) WriteTo(w io.Writer) (int64, error) {
	c := &cpioWriter{w: w}
	for i, e := range a.Entries() {
		if err := c.entry(uint32(i+1), &e); err != nil {
			return c.n, fmt.Errorf("write %s to the initramfs: %w", e.Path, err)
		}
	}
	if err := c.end(); err != nil {
		return c.n, fmt.Errorf("write the end of the initramfs: %w", err)
	}
	return c.n, nil
}
