//go:build linux

package storage

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The layers of an overlay must be mounted in the mount namespace of the thread
// that mounts it (clone_private_mount in fs/namespace.c), and theirs is the
// host's. So a copy of each layer's mount is attached in the stage for as long
// as the mount(2) takes; overlayfs then has copies of its own. Being relative
// to the stage the names are short: hundreds of layers fit into the page that
// mount(2) has for options.

// maxOptions bounds an overlay's options. containerd changes to another thread
// for those of a page less 512 bytes, the least that mount(2) has room for.
const maxOptions = 4096 - 513

// prepareOverlay opens the folders that the options name and replaces them by
// their names in the stage.
func (p *prepared) prepareOverlay() error {
	var upper, work string
	var options, lower []string
	for _, o := range p.mount.Options {
		for _, o := range splitUnescaped(o, ',') {
			switch key, value, _ := strings.Cut(o, "="); key {
			case "upperdir":
				upper = unescape(value)
			case "workdir":
				work = unescape(value)
			case "lowerdir":
				for _, l := range splitUnescaped(value, ':') {
					lower = append(lower, unescape(l))
				}
			default:
				options = append(options, o)
			}
		}
	}
	if upper != "" {
		u, w, err := p.openUpper(upper, work)
		if err != nil {
			return err
		}
		options = append(options, "upperdir="+u, "workdir="+w)
	}
	names := make([]string, 0, len(lower))
	for _, l := range lower {
		if l == "" { // "::" separates layers that hold data only
			names = append(names, "")
			continue
		}
		name, err := p.open(l, p.mapped)
		if err != nil {
			return err
		}
		names = append(names, name)
	}
	p.mount.Options = append(options, "lowerdir="+strings.Join(names, ":"))
	if n := len(strings.Join(p.mount.Options, ",")); n > maxOptions {
		return fmt.Errorf("options of %d bytes for %d layers: at most %d", n, len(names), maxOptions)
	}
	return nil
}

// open opens a layer and returns its name in the stage.
func (p *prepared) open(dir string, o BindOptions) (string, error) {
	t, err := openTree(dir, o, p.legacy)
	if err != nil {
		return "", err
	}
	p.trees = append(p.trees, t)
	return strconv.Itoa(len(p.trees) - 1), nil
}

// openUpper opens the nearest folder that has both upper and work below it,
// because overlayfs wants both on one mount, and returns their names.
func (p *prepared) openUpper(upper, work string) (u, w string, err error) {
	if !filepath.IsAbs(upper) || !filepath.IsAbs(work) {
		return "", "", fmt.Errorf("upperdir %q, workdir %q: want two absolute paths", upper, work)
	}
	if upper, err = filepath.EvalSymlinks(upper); err != nil {
		return "", "", err
	}
	if work, err = filepath.EvalSymlinks(work); err != nil {
		return "", "", err
	}
	common := upper
	for !strings.HasPrefix(work+"/", strings.TrimSuffix(common, "/")+"/") {
		common = filepath.Dir(common)
	}
	name, err := p.open(common, BindOptions{}) // containerd has made it the root's outside
	if err != nil {
		return "", "", err
	}
	below := func(dir string) string { return escape(filepath.Join(name, strings.TrimPrefix(dir, common))) }
	return below(upper), below(work), nil
}

// mountOverlay runs on the pod's thread, whose working directory it borrows.
func (s *Share) mountOverlay(p *prepared, root string) (err error) {
	layers := s.stage("layers")
	// A mount of its own, so that one unmount undoes all that follows.
	if err := unix.Mount("tmpfs", layers, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0700,size=64k"); err != nil {
		return fmt.Errorf("mount tmpfs for layers: %w", err)
	}
	defer func() {
		if e := unmount(layers); err == nil {
			err = e
		}
	}()
	if err := unix.Mount("", layers, "", unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make layers private: %w", err)
	}
	for i, t := range p.trees {
		dir := filepath.Join(layers, strconv.Itoa(i))
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		if err := t.move(dir); err != nil {
			return err
		}
	}
	if err := unix.Chdir(layers); err != nil {
		return &os.PathError{Op: "chdir", Path: layers, Err: err}
	}
	defer func() {
		// Before layers is unmounted, which a working directory would keep.
		if e := unix.Chdir("/"); err == nil && e != nil {
			err = fmt.Errorf("chdir to /: %w", e)
		}
	}()
	return p.mount.Mount(root)
}

// splitUnescaped splits s at each sep that no backslash stands before, as
// overlayfs reads its options (ovl_next_opt in fs/overlayfs/params.c).
func splitUnescaped(s string, sep byte) []string {
	var parts []string
	start := 0
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case sep:
			parts = append(parts, s[start:i])
			start = i + 1
		}
	}
	return append(parts, s[start:])
}

// escape quotes what overlayfs and mount(2) take for more than themselves.
func escape(s string) string {
	return strings.NewReplacer(`\`, `\\`, `,`, `\,`, `:`, `\:`).Replace(s)
}

// unescape removes the backslashes that quote the character after them.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
