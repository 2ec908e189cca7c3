package image

import (
	"debug/elf"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// libraryDirs are where the dynamic linker looks on Debian, apart from paths
// in programs and /etc/ld.so.conf.d, which no program here needs.
const libraryDirs = "/lib/*-linux-gnu"

// Libraries adds the dynamic linker and the shared libraries that the programs
// of this machine need, each at its own path and once.
func (l *Layer) Libraries(programs ...string) *Layer {
	libs, err := libraries(programs...)
	if err != nil && l.err == nil {
		l.err = fmt.Errorf("find libraries: %w", err)
	}
	for _, lib := range libs {
		l.HostFile(strings.TrimPrefix(lib, "/"), 0o755, lib)
	}
	return l
}

// libraries returns the paths of the linker and of the libraries, which
// libraries may need in turn.
func libraries(programs ...string) ([]string, error) {
	var found []string
	for queue := slices.Clone(programs); len(queue) > 0; queue = queue[1:] {
		need, err := needed(queue[0])
		if err != nil {
			return nil, err
		}
		for _, lib := range need {
			if !slices.Contains(found, lib) {
				found = append(found, lib)
				queue = append(queue, lib)
			}
		}
	}
	return found, nil
}

// needed returns the linker and the libraries that one file names.
func needed(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	defer f.Close()
	var paths []string
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		b := make([]byte, p.Filesz)
		if _, err := p.ReadAt(b, 0); err != nil {
			return nil, fmt.Errorf("read the interpreter of %s: %w", file, err)
		}
		paths = append(paths, strings.TrimRight(string(b), "\x00"))
	}
	names, err := f.ImportedLibraries()
	if err != nil {
		return nil, fmt.Errorf("read the libraries of %s: %w", file, err)
	}
	for _, name := range names {
		path, err := findLibrary(name)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		// The linker is named as a library too, by its file name.
		if !slices.ContainsFunc(paths, func(p string) bool { return sameFile(p, path) }) {
			paths = append(paths, path)
		}
	}
	return paths, nil
}

func findLibrary(name string) (string, error) {
	matches, err := filepath.Glob(filepath.Join(libraryDirs, name))
	if err != nil {
		return "", err
	}
	if len(matches) != 1 {
		return "", fmt.Errorf("library %s: %d of that name in %s; want one", name, len(matches), libraryDirs)
	}
	return matches[0], nil
}

func sameFile(a, b string) bool {
	ia, errA := os.Stat(a)
	ib, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(ia, ib)
}
