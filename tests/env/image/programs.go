package image

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/vmrt/vmrt/hack/tools"
)

// PauseName is the image of a pod's first process that the configuration of
// the environments names.
const PauseName = "registry.k8s.io/pause:3.10.1"

// Program compiles one of the programs below the folder program, without
// symbols and without need of a library, and returns it. The Go command's
// cache makes a second call quick.
func Program(ctx context.Context, name string) ([]byte, error) {
	root, err := tools.Root()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "vmrt-program-")
	if err != nil {
		return nil, fmt.Errorf("build program %s: %w", name, err)
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, name)
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w",
		"-o", out, "./tests/env/image/program/"+name)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build program %s: %w: %s", name, err, msg)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		return nil, fmt.Errorf("build program %s: %w", name, err)
	}
	return b, nil
}

// Pause returns the image PauseName.
func Pause(ctx context.Context) (Image, error) {
	b, err := Program(ctx, "pause")
	if err != nil {
		return Image{}, err
	}
	return Image{
		Name:   PauseName,
		Config: Config{User: "65535:65535", Entrypoint: []string{"/pause"}},
		Layers: []*Layer{NewLayer().File("pause", 0o755, b)},
	}, nil
}

// ProbeName is the image of Probe.
const ProbeName = "docker.io/library/probe:latest"

// Probe returns the image of Busybox with a program "probe", an end of a
// network (tests/env/image/program/probe).
func Probe(ctx context.Context) (Image, error) {
	img, err := Busybox()
	if err != nil {
		return Image{}, err
	}
	b, err := Program(ctx, "probe")
	if err != nil {
		return Image{}, err
	}
	img.Name = ProbeName
	img.Layers = append(img.Layers, NewLayer().File("bin/probe", 0o755, b))
	return img, nil
}
