//go:build linux

package storage

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/idmap"
)

// AddRootfs mounts a container's root file system: all of mounts, in order, at
// one place, as containerd's mount.All does. Sources and layers are paths in
// the host's mount namespace. The guest sees it only once it is complete.
//
// Types: overlay, bind, and whatever the host's kernel mounts from a file
// (with or without option loop) or a block device. Not supported, with
// errors.ErrUnsupported: types that need a helper program (fuse.*) or
// containerd's mount manager (format/*, mkfs/*).
//
// containerd's options uidmap and gidmap make a bind mount, or the lower
// layers of an overlay, id-mapped ones, in which an owner is seen as the id
// that stands for it outside the container's user namespace.
func (s *Share) AddRootfs(container string, mounts []mount.Mount) (Entry, error) {
	if len(mounts) == 0 {
		return Entry{}, fmt.Errorf("mount root file system of container %s: no mounts", container)
	}
	prepared := make([]*prepared, 0, len(mounts))
	defer func() {
		for _, p := range prepared {
			p.close()
		}
	}()
	for i, m := range mounts {
		p, err := prepare(m, s.legacy)
		if err != nil {
			return Entry{}, fmt.Errorf("mount %s %d of container %s: %w", m.Type, i, container, err)
		}
		prepared = append(prepared, p)
	}
	var e Entry
	err := s.do(func() error {
		c, err := s.container(container)
		if err != nil {
			return err
		}
		e, err = s.place(c, "rootfs", true, func(target string) error {
			return s.mountAll(prepared, target)
		})
		return err
	})
	if err != nil {
		return Entry{}, fmt.Errorf("mount root file system of container %s: %w", container, err)
	}
	return e, nil
}

// mountAll puts the mounts together in the stage and moves the result to
// target.
func (s *Share) mountAll(mounts []*prepared, target string) (err error) {
	stage := s.stage("dir")
	mounted := false
	defer func() {
		// What was mounted on top of the first goes with it.
		if err != nil && mounted {
			_ = unmount(stage)
		}
	}()
	for i, p := range mounts {
		if err := s.mountOne(p, stage); err != nil {
			return fmt.Errorf("%s %d: %w", p.mount.Type, i, err)
		}
		mounted = mounted || p.mount.Target == ""
	}
	if !mounted {
		return errors.New("no mount at its root")
	}
	if err := unix.Mount("", stage, "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make it private: %w", err)
	}
	if !s.legacy {
		// A second line of defence, so kernels without it do without.
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID}
		err := unix.MountSetattr(unix.AT_FDCWD, stage, unix.AT_RECURSIVE, &attr)
		if err != nil && !errors.Is(err, unix.ENOSYS) {
			return fmt.Errorf("mount_setattr: %w", err)
		}
	}
	return move(stage, target)
}

// prepared is a mount whose sources have been opened in the host's mount
// namespace.
type prepared struct {
	mount mount.Mount // with options of its own
	// file is the source, where that is a path.
	file *os.File
	// trees are a bind's source, or an overlay's folders: the one that holds
	// the upper and the work folder, if any, then the lower ones. Option
	// strings name them by their index.
	trees []*tree
	// mapped are the options of trees whose ids are mapped; zero if none are.
	mapped BindOptions
	legacy bool
}

func (p *prepared) close() {
	if p.file != nil {
		p.file.Close()
	}
	if p.mapped.userns != nil {
		p.mapped.userns.Close()
	}
	for _, t := range p.trees {
		t.close()
	}
}

// prepare opens what m names. It runs in the host's mount namespace.
func prepare(m mount.Mount, legacy bool) (*prepared, error) {
	ids, options, err := takeIDs(m.Options)
	if err != nil {
		return nil, err
	}
	m.Options = options
	p := &prepared{mount: m, legacy: legacy}
	if !ids.IsZero() {
		p.mapped.IDs = ids
		if p.mapped.userns, err = newUserNamespace(ids); err != nil {
			return nil, err
		}
	}
	switch {
	case strings.Contains(m.Type, "/") || strings.HasPrefix(m.Type, "fuse"):
		err = fmt.Errorf("type %q: %w", m.Type, errors.ErrUnsupported)
	case m.Type == "overlay":
		err = p.prepareOverlay()
	case slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind"):
		err = p.prepareBind()
	case !ids.IsZero():
		err = fmt.Errorf("option uidmap of type %q: %w", m.Type, errors.ErrUnsupported)
	case filepath.IsAbs(m.Source):
		// O_PATH: the kernel, or the loop driver, opens it again.
		p.file, err = os.OpenFile(m.Source, unix.O_PATH, 0)
	}
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// takeIDs parts the options from those that are containerd's own, and returns
// the ids that these hold.
func takeIDs(options []string) (ids idmap.Mapping, rest []string, err error) {
	for _, o := range options {
		switch key, value, _ := strings.Cut(o, "="); key {
		case "uidmap":
			ids.UIDs, err = idmap.Parse(value)
		case "gidmap":
			ids.GIDs, err = idmap.Parse(value)
		default:
			rest = append(rest, o)
		}
		if err != nil {
			return ids, nil, fmt.Errorf("option %q: %w", o, err)
		}
	}
	if !ids.IsZero() {
		err = ids.Check()
	}
	return ids, rest, err
}

func (p *prepared) prepareBind() error {
	o := p.mapped
	o.RecursiveIDs = true
	for _, name := range p.mount.Options {
		switch name {
		case "rbind":
			o.Recursive = true
		case "ro":
			o.ReadOnly = true
		case "bind", "rw", "private", "rprivate", "nodev", "nosuid": // so it is
		default:
			return fmt.Errorf("option %q of a bind mount: %w", name, errors.ErrUnsupported)
		}
	}
	t, err := openTree(p.mount.Source, o, p.legacy)
	if err != nil {
		return err
	}
	p.trees = []*tree{t}
	return nil
}

// mountOne mounts p below root; it runs on the pod's thread.
func (s *Share) mountOne(p *prepared, root string) error {
	m := p.mount
	switch {
	case p.file != nil:
		m.Source = fmt.Sprintf("/proc/self/fd/%d", p.file.Fd())
	case m.Type == "overlay":
		return s.mountOverlay(p, root)
	case p.trees != nil:
		if m.Target != "" {
			return fmt.Errorf("bind mount below the root: %w", errors.ErrUnsupported)
		}
		return s.attach(p.trees[0], root)
	}
	return m.Mount(root)
}
