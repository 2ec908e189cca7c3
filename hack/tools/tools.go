// Package tools builds the programs of other projects that demonstrations and
// tests run: containerd, runc, nerdctl and so on. Each one is pinned by a
// module in a folder beside this file, whose go.mod names the programs as tools
// and whose go.sum fixes every byte that is compiled. Few are edited first: see
// Edit.
//
// What is built goes to a cache outside the tree, in a folder named after the
// hash of everything that went in; a second call finds it there. Calls from
// several processes at once are safe: one builds, the others wait. Nothing is
// ever removed from the cache. The Go toolchain and the machine's C libraries
// are trusted to behave the same each time; only the toolchain's version and
// the inputs in the tree are hashed.
package tools

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Tool is one pinned module and how its programs are built.
type Tool struct {
	// Name is what Build is asked for.
	Name string
	// Module is the module's folder beside this package; Name when empty.
	Module string
	// Doc says in one line what is built.
	Doc string
	// CGO says that a C compiler and the C libraries are needed.
	CGO bool
	// Tags are build tags.
	Tags []string
	// LDFlags are linker flags beside -s -w.
	LDFlags string
	// Packages are what is built; the module's tools when empty.
	Packages []string
	// Tests are packages whose tests are compiled, each into a program that is
	// named after the last element of its path and ends in ".test".
	Tests []string
	// Edits are made to the sources first.
	Edits []Edit
}

// TestImageDigest is the digest of the image that critest pulls by digest. The
// upstream image cannot be made again here, so critest is built with the digest
// of ours (on amd64): package criimage makes it.
const TestImageDigest = "sha256:1680a4e1851e28bf218e005d8e1716bbb1c439812cbc9669ceb60ec2fa119f3c"

// lean leaves out the snapshotters and exporters that nothing here uses.
var lean = []string{"no_btrfs", "no_devmapper", "no_zfs", "no_tracing"}

// All are the tools in the order of their names.
var All = []Tool{
	{
		Name: "cni", Doc: "CNI plugins v1.9.1: bridge, host-local, loopback, portmap, …",
		LDFlags: "-X github.com/containernetworking/plugins/pkg/utils/buildversion.BuildVersion=v1.9.1",
	},
	{
		Name: "containerd", Doc: "containerd, ctr and containerd-shim-runc-v2 v2.4.2", Tags: lean,
		LDFlags: "-X github.com/containerd/containerd/v2/version.Version=v2.4.2",
	},
	{
		Name: "containerd-2.3", Doc: "the same of the long-term branch, v2.3.7", Tags: lean,
		LDFlags: "-X github.com/containerd/containerd/v2/version.Version=v2.3.7",
	},
	{
		Name: "containerd-lean", Doc: "containerd without CRI and ctr v2.4.2", Module: "containerd",
		Tags:     append([]string{"no_cri"}, lean...),
		LDFlags:  "-X github.com/containerd/containerd/v2/version.Version=v2.4.2",
		Packages: []string{"github.com/containerd/containerd/v2/cmd/containerd", "github.com/containerd/containerd/v2/cmd/ctr"},
	},
	{
		Name: "critest", Doc: "critest v1.36.0 and ginkgo, which runs it", Module: "critools",
		LDFlags:  "-X sigs.k8s.io/cri-tools/pkg/version.Version=v1.36.0",
		Packages: []string{"github.com/onsi/ginkgo/v2/ginkgo"},
		Tests:    []string{"sigs.k8s.io/cri-tools/cmd/critest"},
		Edits: []Edit{{
			Module: "sigs.k8s.io/cri-tools", File: "pkg/validate/consts.go",
			Old: "test-image-digest@sha256:9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf",
			New: "test-image-digest@" + TestImageDigest,
		}},
	},
	{
		Name: "critools", Doc: "crictl v1.36.0",
		LDFlags:  "-X sigs.k8s.io/cri-tools/pkg/version.Version=v1.36.0",
		Packages: []string{"sigs.k8s.io/cri-tools/cmd/crictl"},
	},
	{
		Name: "docker", Doc: "dockerd v28.5.2", Tags: []string{"no_btrfs", "exclude_graphdriver_btrfs", "exclude_graphdriver_zfs"},
		LDFlags: "-X github.com/docker/docker/dockerversion.Version=28.5.2",
	},
	{
		Name: "nerdctl", Doc: "nerdctl v2.2.1",
		LDFlags: "-X github.com/containerd/nerdctl/v2/pkg/version.Version=v2.2.1",
	},
	{
		Name: "runc", Doc: "runc v1.5.2", CGO: true, Tags: []string{"seccomp", "netgo", "osusergo"},
		LDFlags: "-X main.version=1.5.2",
	},
}

// source returns the tool's module below the top of the source tree.
func (t Tool) source(root string) string {
	module := t.Module
	if module == "" {
		module = t.Name
	}
	return filepath.Join(root, "hack", "tools", module)
}

// Lookup returns the tool of that name.
func Lookup(name string) (Tool, error) {
	i := slices.IndexFunc(All, func(t Tool) bool { return t.Name == name })
	if i < 0 {
		return Tool{}, fmt.Errorf("tool %q: not one of this project's", name)
	}
	return All[i], nil
}

// CacheDir returns the folder that keeps what can be made again: vmrt in the
// user's cache folder, which is $XDG_CACHE_HOME or ~/.cache.
func CacheDir() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the user's cache folder: %w", err)
	}
	return filepath.Join(dir, "vmrt"), nil
}

// Root returns the top of the source tree that holds the working directory.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find the source tree: %w", err)
	}
	for {
		b, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && strings.HasPrefix(string(b), "module github.com/vmrt/vmrt\n") {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", fmt.Errorf("find the source tree: no go.mod of this project above the working directory")
		}
		dir = parent
	}
}

// Build returns the folder that holds the tool's programs and nothing else,
// and builds them first when the cache has none. It says so on progress, with
// the time that passes; nil keeps it silent.
func Build(ctx context.Context, name string, progress io.Writer) (string, error) {
	t, err := Lookup(name)
	if err != nil {
		return "", err
	}
	root, err := Root()
	if err != nil {
		return "", err
	}
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	src := t.source(root)
	key, err := t.key(src)
	if err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	dir := filepath.Join(cache, "tools", name+"-"+key)
	if exists(dir) {
		return dir, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	unlock, err := lock(dir + ".lock")
	if err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	defer unlock()
	if exists(dir) { // another process built it while this one waited
		return dir, nil
	}
	if err := t.build(ctx, src, dir, progress); err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	return dir, nil
}

// build compiles into a folder beside dir and renames it into place.
func (t Tool) build(ctx context.Context, src, dir string, progress io.Writer) error {
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".building-"+t.Name+"-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	modfile, err := t.edit(ctx, src)
	if err != nil {
		return err
	}
	if modfile != "" {
		defer os.RemoveAll(filepath.Dir(modfile))
	}
	stop := report(progress, "building "+t.Doc)
	defer stop()
	packages := t.Packages
	if len(packages) == 0 {
		packages = []string{"tool"}
	}
	if err := t.goCommand(ctx, src, modfile, append([]string{"build", "-o", tmp + "/"}, packages...)); err != nil {
		return err
	}
	for _, pkg := range t.Tests {
		if err := t.goCommand(ctx, src, modfile, []string{"test", "-c", "-o", filepath.Join(tmp, path.Base(pkg)+".test"), pkg}); err != nil {
			return err
		}
	}
	return os.Rename(tmp, dir)
}

// goCommand runs a go command that compiles; args are a subcommand with its own
// flags first, then packages.
func (t Tool) goCommand(ctx context.Context, src, modfile string, args []string) error {
	flags := []string{
		"-mod=readonly", "-trimpath", "-buildvcs=false",
		"-tags=" + strings.Join(t.Tags, ","), "-ldflags=-s -w " + t.LDFlags,
	}
	if modfile != "" {
		flags = append(flags, "-modfile="+modfile)
	}
	cmd := exec.CommandContext(ctx, "go", slices.Insert(args, 1, flags...)...)
	cmd.Dir = src
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=", "CGO_ENABLED="+map[bool]string{true: "1", false: "0"}[t.CGO])
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s in %s: %w\n%s", args[0], src, err, tail(out, 4096))
	}
	return nil
}

// key hashes everything that decides the result and lies in the tree.
func (t Tool) key(src string) (string, error) {
	h := sha256.New()
	t.Doc = ""
	fmt.Fprintf(h, "%s\n%s\n%#v\n", runtime.Version(), runtime.GOARCH, t)
	err := filepath.WalkDir(src, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, path)
		if err != nil {
			return err
		}
		fmt.Fprintf(h, "%s %d\n%s", rel, len(b), b)
		return nil
	})
	if err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil))[:12], nil
}

// lock takes an exclusive lock that ends with the process at the latest.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
		if err != syscall.EINTR {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}

// report says what is being done, and every 15 seconds for how long.
func report(w io.Writer, what string) (stop func()) {
	if w == nil {
		return func() {}
	}
	start := time.Now()
	fmt.Fprintf(w, "%s\n", what)
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(15 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				fmt.Fprintf(w, "  … %d s\n", int(time.Since(start).Seconds()))
			case <-done:
				fmt.Fprintf(w, "  took %.0f s\n", time.Since(start).Seconds())
				return
			}
		}
	}()
	return func() { close(done); <-ended }
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// tail returns the last n bytes of b at most.
func tail(b []byte, n int) []byte {
	if len(b) > n {
		return b[len(b)-n:]
	}
	return b
}
