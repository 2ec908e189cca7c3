// Package kmod finds Linux kernel modules, in the order in which they must be
// loaded, in a folder as a distribution's kernel package holds it: without the
// indexes that depmod(8) makes when a package is installed. What a module
// depends on is read from the module itself, from the depends= and softdep=
// entries of its .modinfo section (kernel: scripts/mod/modpost.c,
// include/linux/module.h).
//
// Modules may be plain, or compressed by gzip, xz or zstd. A Tree is not safe
// for concurrent use. Aliases are not resolved: a soft dependency that names
// one is left out, and callers list the module that they want instead.
package kmod

import (
	"bufio"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Module is one module and its content.
type Module struct {
	// Name has underscores only, as in /proc/modules.
	Name string
	// Path is relative to the tree and ends in ".ko".
	Path string
	// Data is the ELF object, not compressed.
	Data []byte
}

// Tree is a /lib/modules/<release> folder.
type Tree struct {
	dir string
	// files maps a module's name to its path below dir.
	files   map[string]string
	builtin map[string]bool
	loaded  map[string]*Module
}

// Open reads which modules the folder dir has and which the kernel has built
// in (modules.builtin).
func Open(dir string) (*Tree, error) {
	t := &Tree{
		dir:     dir,
		files:   make(map[string]string),
		builtin: make(map[string]bool),
		loaded:  make(map[string]*Module),
	}
	b, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("read the kernel's modules: %w", err)
	}
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		t.builtin[nameOf(s.Text())] = true
	}
	err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || !isModule(p) {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		t.files[nameOf(p)] = rel
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list the kernel's modules: %w", err)
	}
	return t, nil
}

// ErrNotFound says that a kernel has a module neither as a file nor built in.
var ErrNotFound = errors.New("the kernel does not have it")

// Resolve returns the named modules and everything that they depend on, each
// once, dependencies first. Modules that are built in are left out.
func (t *Tree) Resolve(names []string) ([]*Module, error) {
	r := resolver{tree: t, state: make(map[string]visit)}
	for _, n := range names {
		if err := r.add(nameOf(n)); err != nil {
			return nil, fmt.Errorf("kernel module %s: %w", n, err)
		}
	}
	return r.order, nil
}

// Has reports whether the kernel has the module, built in or as a file.
func (t *Tree) Has(name string) bool {
	_, ok := t.files[nameOf(name)]
	return ok || t.builtin[nameOf(name)]
}

type visit int

const (
	unseen visit = iota
	underway
	done
)

// resolver walks dependencies depth first.
type resolver struct {
	tree  *Tree
	state map[string]visit
	order []*Module
}

func (r *resolver) add(name string) (err error) {
	if r.state[name] == done || r.tree.builtin[name] {
		return nil
	}
	if r.state[name] == underway {
		return errors.New("depends on itself")
	}
	r.state[name] = underway
	defer func() {
		if err != nil {
			r.state[name] = unseen
		}
	}()
	m, err := r.tree.read(name)
	if err != nil {
		return err
	}
	hard, soft, err := dependencies(m.Data)
	if err != nil {
		return fmt.Errorf("read %s: %w", m.Path, err)
	}
	for _, dep := range soft {
		// Wanted, not needed: one that cannot come first stays out.
		_ = r.add(dep)
	}
	for _, dep := range hard {
		if err := r.add(dep); err != nil {
			return fmt.Errorf("needs %s: %w", dep, err)
		}
	}
	r.state[name] = done
	r.order = append(r.order, m)
	return nil
}

// read returns a module with its content, which is read once.
func (t *Tree) read(name string) (*Module, error) {
	if m := t.loaded[name]; m != nil {
		return m, nil
	}
	rel, ok := t.files[name]
	if !ok {
		return nil, ErrNotFound
	}
	data, err := readModule(filepath.Join(t.dir, rel))
	if err != nil {
		return nil, err
	}
	m := &Module{Name: name, Path: rel[:strings.LastIndex(rel, ".ko")+3], Data: data}
	t.loaded[name] = m
	return m, nil
}

// dependencies returns the modules that the module in data names: those that
// it cannot do without, and those that it wants to be loaded before it.
func dependencies(data []byte) (hard, soft []string, err error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, nil, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, nil, errors.New("no .modinfo section")
	}
	info, err := s.Data()
	if err != nil {
		return nil, nil, fmt.Errorf("section .modinfo: %w", err)
	}
	for entry := range strings.SplitSeq(string(info), "\x00") {
		key, value, _ := strings.Cut(entry, "=")
		switch key {
		case "depends":
			for dep := range strings.SplitSeq(value, ",") {
				if dep != "" {
					hard = append(hard, nameOf(dep))
				}
			}
		case "softdep":
			soft = append(soft, before(value)...)
		}
	}
	return hard, soft, nil
}

// before returns the modules after "pre:" in a soft dependency such as
// "pre: crc32c post: x".
func before(softdep string) []string {
	var names []string
	pre := false
	for word := range strings.FieldsSeq(softdep) {
		switch {
		case strings.HasSuffix(word, ":"):
			pre = word == "pre:"
		case pre:
			names = append(names, nameOf(word))
		}
	}
	return names
}

// isModule reports whether a file is a module by its name: .ko, and at most one
// suffix for its compression.
func isModule(file string) bool {
	if filepath.Ext(file) != ".ko" {
		file = strings.TrimSuffix(file, filepath.Ext(file))
	}
	return filepath.Ext(file) == ".ko"
}

// nameOf returns the module name for a path or a name: modules are known by
// underscores, files may have dashes.
func nameOf(file string) string {
	base := filepath.Base(file)
	if i := strings.LastIndex(base, ".ko"); i > 0 {
		base = base[:i]
	}
	return strings.ReplaceAll(base, "-", "_")
}
