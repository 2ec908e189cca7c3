package cgroup

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
)

// defaultParent holds the cgroups of pods that ask for none.
const defaultParent = "/vmrt"

// Path is the path that Create gives to a cgroup.
func Path(cgroupsPath, id string) (string, error) { return resolve(cgroupsPath, id) }

// resolve turns an OCI cgroupsPath into a path below a hierarchy's root.
func resolve(cgroupsPath, id string) (string, error) {
	p := cgroupsPath
	if p == "" {
		if id == "" {
			return "", invalid(cgroupsPath, "no id to name it by")
		}
		p = defaultParent + "/" + id
	}
	if parts := strings.Split(p, ":"); len(parts) == 3 && !strings.Contains(p, "/") {
		var err error
		if p, err = systemdPath(parts[0], parts[1], parts[2]); err != nil {
			return "", invalid(cgroupsPath, err.Error())
		}
	}
	p = path.Clean("/" + p)
	return p, check(p)
}

// check refuses what is no path of a pod's cgroup.
func check(p string) error {
	switch {
	case !path.IsAbs(p) || path.Clean(p) != p || strings.ContainsRune(p, 0):
		return invalid(p, "not a clean absolute path")
	case p == "/":
		return invalid(p, "the root cgroup cannot be a pod's")
	}
	return nil
}

// systemdPath returns the path that systemd gives to a scope, or to the slice
// called name (systemd.slice(5)): a-b.slice is within a.slice. Empty: no slice
// is system.slice, as for runc.
func systemdPath(slice, prefix, name string) (string, error) {
	if slice == "" {
		slice = "system.slice"
	}
	parent, err := expandSlice(slice)
	if err != nil {
		return "", err
	}
	if name == "" {
		return "", fmt.Errorf("no name of a unit")
	}
	unit := name
	if !strings.HasSuffix(name, ".slice") {
		unit = name + ".scope"
		if prefix != "" {
			unit = prefix + "-" + unit
		}
	}
	return path.Join(parent, unit), nil
}

func expandSlice(slice string) (string, error) {
	name, ok := strings.CutSuffix(slice, ".slice")
	if !ok || name == "" {
		return "", fmt.Errorf("invalid slice name: %s", slice)
	}
	if name == "-" {
		return "/", nil
	}
	p, prefix := "/", ""
	for component := range strings.SplitSeq(name, "-") {
		if component == "" {
			return "", fmt.Errorf("invalid slice name: %s", slice)
		}
		prefix += component
		p = path.Join(p, prefix+".slice")
		prefix += "-"
	}
	return p, nil
}

func invalid(p, why string) error {
	return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("cgroup path %q: %s", p, why))
}
