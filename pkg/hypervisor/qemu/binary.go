package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"github.com/vmrt/vmrt/pkg/hypervisor/internal/bootcache"
)

// probeTimeout bounds running the binary for its version, which takes 20 ms.
const probeTimeout = 10 * time.Second

// sandboxRules let QEMU neither start processes nor gain privileges nor change
// priorities, by seccomp.
const sandboxRules = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

// Version is a release of QEMU.
type Version struct {
	Major, Minor, Micro int
}

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro) }

func (v Version) before(major, minor int) bool {
	return v.Major < major || v.Major == major && v.Minor < minor
}

// Binary is what the command line depends on in a QEMU binary.
type Binary struct {
	// Path is absolute.
	Path    string
	Version Version
	// Sandbox: the seccomp sandbox is compiled in.
	Sandbox bool
}

// takesKVM reports whether the binary can be given an open /dev/kvm.
func (b Binary) takesKVM() bool { return !b.Version.before(9, 0) }

// Identify finds out what the command line depends on in the binary that name,
// a path or a name to look up in PATH, stands for. The answer is cached in dir
// until the binary or the boot changes; "" is hypervisor.DefaultCacheDir.
//
// The error matches os.ErrNotExist if there is no such binary, and
// errors.ErrUnsupported if it is too old.
func Identify(ctx context.Context, name, dir string) (Binary, error) {
	path, err := lookUp(name)
	if err != nil {
		return Binary{}, err
	}
	file, key, err := binaryCache(path, dir)
	if err != nil {
		return Binary{}, err
	}
	var b Binary
	if err := bootcache.Load(file, key, &b); err != nil {
		if b, err = inspect(ctx, path); err != nil {
			return Binary{}, err
		}
		// Without the cache the next caller pays again, nothing else.
		_ = bootcache.Store(file, key, b)
	}
	if b.Version.before(7, 2) {
		return Binary{}, fmt.Errorf("%s is QEMU %s: want 7.2 or newer: %w", path, b.Version, errors.ErrUnsupported)
	}
	return b, nil
}

func lookUp(name string) (string, error) {
	path, err := exec.LookPath(name)
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return "", fmt.Errorf("find QEMU %q in PATH: %w", name, os.ErrNotExist)
	case err != nil:
		return "", fmt.Errorf("find QEMU: %w", err)
	}
	return filepath.Abs(path)
}

// binaryCache returns the cache file for the binary at path and the key that
// changes with it.
func binaryCache(path, dir string) (file, key string, err error) {
	fi, err := os.Stat(path)
	if err != nil {
		return "", "", fmt.Errorf("find QEMU: %w", err)
	}
	h := fnv.New64a()
	h.Write([]byte(path))
	return cacheFile(dir, fmt.Sprintf("qemu-%016x.json", h.Sum64())),
		fmt.Sprintf("%s %d %d", path, fi.Size(), fi.ModTime().UnixNano()), nil
}

// inspect runs the binary at path for its version, asking for the sandbox in
// the same run.
func inspect(ctx context.Context, path string) (Binary, error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	b := Binary{Path: path, Sandbox: true}
	out, err := run(ctx, path, "-sandbox", sandboxRules, "-version")
	if err != nil {
		b.Sandbox = false
		if out, err = run(ctx, path, "-version"); err != nil {
			return Binary{}, err
		}
	}
	if b.Version, err = parseVersion(out); err != nil {
		return Binary{}, fmt.Errorf("run %s -version: %w", path, err)
	}
	return b, nil
}

func run(ctx context.Context, path string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = environment
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err == nil {
		return out, nil
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && len(exit.Stderr) > 0 {
		return nil, fmt.Errorf("run %s -version: %w: %s", path, err, printable(exit.Stderr[:min(len(exit.Stderr), maxLine)]))
	}
	return nil, fmt.Errorf("run %s -version: %w", path, err)
}

var versionLine = regexp.MustCompile(`^QEMU emulator version (\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?`)

// parseVersion reads the first line of `qemu -version`.
func parseVersion(out []byte) (Version, error) {
	m := versionLine.FindSubmatch(out)
	if m == nil {
		line, _, _ := bytes.Cut(out, []byte("\n"))
		return Version{}, fmt.Errorf("version %.80q: want QEMU emulator version N.N", line)
	}
	var n [3]int
	for i := range n {
		// The expression admits short numbers only; no third one is 0.
		n[i], _ = strconv.Atoi(string(m[i+1]))
	}
	return Version{n[0], n[1], n[2]}, nil
}
