//go:build linux

// Package storage holds what a pod's virtual machine sees of the host's files:
// one shared folder for each pod, and the virtiofsd that serves it.
//
// Contract. The folder and everything mounted in it exist in the pod's mount
// namespace only (package podns) and vanish with it. Sources are named by their
// paths in the host's mount namespace and opened there, by a thread that is not
// the pod's, when they are added: mounts that appeared on the host after the
// pod did are found, whatever their propagation. The guest can write below the
// root file systems and volumes that are added writable, and nowhere else: the
// folder itself is read-only to it. A file is shared by itself, never with its
// siblings. Names in the folder are chosen here; no host path is among them.
//
// The folder is a shared mount, so that a virtiofsd that has unshared its mount
// namespace sees what is added later (mount_namespaces(7)).
//
// Concurrency: every method may be called from any goroutine, and not from a
// function that runs in podns's Do. The state belongs to the pod's thread.
//
// Not guaranteed: what was removed is free for the host at once. A guest that
// still looks at it keeps it in virtiofsd, until the guest lets go or the pod
// ends.
package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/podns"
)

// ErrClosed is returned when something is added after Close.
var ErrClosed = errors.New("shared folder is closed")

// Share is a pod's shared folder.
//
// Its file system, a tmpfs mounted at dir, holds three folders: tree, where
// mount points are made; share, a read-only view of tree, where things are
// mounted and which virtiofsd serves; stage, where root file systems are put
// together out of the guest's sight.
type Share struct {
	ns  *podns.Namespaces
	dir string
	// legacy avoids mount_setattr(2), which Linux has since 5.12.
	legacy bool

	// What follows is touched only in ns.Do.
	closed     bool
	made       int // containers so far, to give each folder a new name
	containers map[string]*container
	claims     claims
}

type container struct {
	name   string // of its folder: "web.1"
	mounts int    // so far, to give each bind a new name
	paths  []string
}

// Entry is something in the shared folder.
type Entry struct {
	// Share is the slash-separated path below the shared folder, which is
	// also its path below the guest's mount of it: "web.1/rootfs".
	Share string
	// Host is the same thing as an absolute path in the pod's mount
	// namespace. It never goes to the guest.
	Host string
	// Dir tells a folder from any other kind of file.
	Dir bool
	// Endpoint: it is a socket or FIFO, which joins processes of one kernel.
	Endpoint bool
	// PartlyReadOnly: it is read-only, and what is mounted below it, or may be
	// later, is not. The guest sees all of it as one file system, so only the
	// host's mounts can tell the two apart.
	PartlyReadOnly bool
}

// NewShare makes an empty shared folder: a file system of its own, mounted at
// dir, an existing folder, in the pod's mount namespace only.
func NewShare(ns *podns.Namespaces, dir string) (*Share, error) {
	if !filepath.IsAbs(dir) {
		return nil, fmt.Errorf("make shared folder %q: path is not absolute", dir)
	}
	s := &Share{ns: ns, dir: dir, containers: make(map[string]*container), claims: make(claims)}
	if err := s.do(s.mount); err != nil {
		return nil, fmt.Errorf("make shared folder %s: %w", dir, err)
	}
	return s, nil
}

func (s *Share) do(f func() error) error { return s.ns.Do(context.Background(), f) }

// mount mounts the folder's file system. Only this process writes to it, so it
// needs no room but for names.
func (s *Share) mount() (err error) {
	if err := unix.Mount("tmpfs", s.dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700,size=1m"); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	defer func() {
		if err != nil {
			_ = unix.Unmount(s.dir, unix.MNT_DETACH)
		}
	}()
	// Private: a mount can only be moved away from a parent that is not
	// shared, and staged mounts are nobody else's.
	if err := unix.Mount("", s.dir, "", unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make it private: %w", err)
	}
	for _, d := range []string{s.tree(), s.Root(), s.stage()} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return err
		}
	}
	for _, d := range []string{s.stage("dir"), s.stage("layers")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return err
		}
	}
	if err := os.WriteFile(s.stage("file"), nil, 0o600); err != nil {
		return err
	}
	if err := unix.Mount(s.tree(), s.Root(), "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind its root: %w", err)
	}
	const ro = unix.MS_REMOUNT | unix.MS_BIND | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("", s.Root(), "", ro, ""); err != nil {
		return fmt.Errorf("make its root read-only: %w", err)
	}
	if err := unix.Mount("", s.Root(), "", unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("make its root a shared mount: %w", err)
	}
	return nil
}

// Root returns the folder that is exported to the guest, a path in the pod's
// mount namespace.
func (s *Share) Root() string { return filepath.Join(s.dir, "share") }

func (s *Share) tree(elem ...string) string {
	return filepath.Join(s.dir, "tree", filepath.Join(elem...))
}

func (s *Share) stage(elem ...string) string {
	return filepath.Join(s.dir, "stage", filepath.Join(elem...))
}

// AddBind adds source, a path in the host's mount namespace. For a missing
// source the error is `stat <source>: no such file or directory`, which runc
// reports after `error mounting "<source>" to rootfs at "<destination>": `.
func (s *Share) AddBind(container, source string, o BindOptions) (Entry, error) {
	t, err := openTree(source, o, s.legacy)
	if err != nil {
		return Entry{}, err
	}
	defer t.close()
	var e Entry
	err = s.do(func() error {
		c, err := s.container(container)
		if err != nil {
			return err
		}
		n := strconv.Itoa(c.mounts)
		c.mounts++
		e, err = s.place(c, path.Join("mounts", n), t.mode.IsDir(), func(target string) error {
			if err := s.attach(t, target); err != nil || !o.Memory || !t.mode.IsDir() {
				return err
			}
			if err := s.claims.add(target); err != nil {
				_ = unmount(target)
				return err
			}
			return nil
		})
		return err
	})
	e.Endpoint = t.mode&(os.ModeSocket|os.ModeNamedPipe) != 0
	if err == nil && o.Recursive && o.ReadOnly && !o.ReadOnlyRecursive {
		e.PartlyReadOnly = o.Slave
		if !o.Slave {
			e.PartlyReadOnly, err = hasSubmounts(source)
		}
	}
	if err != nil {
		return Entry{}, fmt.Errorf("share %s: %w", source, err)
	}
	return e, nil
}

// hasSubmounts reports whether something is mounted below path in the calling
// thread's mount namespace.
func hasSubmounts(path string) (bool, error) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return false, err
	}
	below, err := mountinfo.GetMounts(mountinfo.PrefixFilter(path))
	if err != nil {
		return false, fmt.Errorf("list mounts: %w", err)
	}
	return slices.ContainsFunc(below, func(m *mountinfo.Info) bool { return m.Mountpoint != path }), nil
}

// container returns the state of a container, making its folder when it is
// new. The name's number keeps a guest that remembers an earlier container of
// the same id from mixing up the two.
func (s *Share) container(id string) (*container, error) {
	if s.closed {
		return nil, ErrClosed
	}
	if c := s.containers[id]; c != nil {
		return c, nil
	}
	if err := checkID(id); err != nil {
		return nil, err
	}
	c := &container{name: fmt.Sprintf("%s.%d", id, s.made+1)}
	if err := os.MkdirAll(s.tree(c.name, "mounts"), 0o700); err != nil {
		return nil, err
	}
	s.made++
	s.containers[id] = c
	return c, nil
}

// checkID returns an error unless id can be the name of a file.
func checkID(id string) error {
	if id == "" || id == "." || id == ".." || len(id) > 200 || filepath.Base(id) != id {
		return fmt.Errorf("container id %q is no file name", id)
	}
	return nil
}

// place makes the mount point name in c's folder and lets attach mount
// something there.
func (s *Share) place(c *container, name string, dir bool, attach func(target string) error) (e Entry, err error) {
	e = Entry{Share: path.Join(c.name, name), Host: filepath.Join(s.Root(), c.name, name), Dir: dir}
	point := s.tree(c.name, name)
	if dir {
		err = os.Mkdir(point, 0o700)
	} else {
		err = os.WriteFile(point, nil, 0o600)
	}
	if err != nil {
		return Entry{}, err
	}
	if err := attach(e.Host); err != nil {
		_ = os.Remove(point)
		return Entry{}, err
	}
	c.paths = append(c.paths, e.Host)
	return e, nil
}

// RemoveContainer unmounts and removes everything that was added for the
// container. Idempotent; for an unknown container there is nothing to do.
//
// A guest that has looked at it lets go when it next looks, once its cached
// names have expired, or at once when it tries to create the container's folder
// ("web.1" of an Entry.Share), which the read-only share refuses with EROFS:
// names are looked up anew for that (fuse_dentry_revalidate in fs/fuse/dir.c).
func (s *Share) RemoveContainer(container string) error {
	err := s.do(func() error {
		c := s.containers[container]
		if c == nil || s.closed {
			return nil
		}
		for len(c.paths) > 0 {
			last := len(c.paths) - 1
			if err := unmount(c.paths[last]); err != nil {
				return err
			}
			c.paths = slices.Delete(c.paths, last, last+1)
		}
		// Through the view that has no mounts: nothing but our own mount
		// points is in reach.
		if err := os.RemoveAll(s.tree(c.name)); err != nil {
			return err
		}
		delete(s.containers, container)
		return nil
	})
	if errors.Is(err, podns.ErrClosed) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove container %s from the shared folder: %w", container, err)
	}
	return nil
}

// Close unmounts the shared folder with everything in it. Idempotent.
func (s *Share) Close() error {
	err := s.do(func() error {
		if s.closed {
			return nil
		}
		if err := unmount(s.dir); err != nil {
			return err
		}
		s.closed = true
		s.claims.close()
		return nil
	})
	if errors.Is(err, podns.ErrClosed) {
		s.claims.close() // nobody else is left to touch them
		return nil       // and the mounts are gone with the namespace
	}
	return err
}

// unmount detaches the mount at path and everything below it.
func unmount(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil {
		return &os.PathError{Op: "unmount", Path: path, Err: err}
	}
	return nil
}
