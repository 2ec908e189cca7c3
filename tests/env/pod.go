package env

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
)

// Object is a JSON object: part of a PodSandboxConfig or a ContainerConfig of
// the CRI, with the names of its protobuf fields.
type Object = map[string]any

// Pod is a pod that crictl runs.
type Pod struct {
	// ID is the sandbox's.
	ID string
	// LogDir holds the log of each container, NAME.log.
	LogDir string

	env    *Env
	config string // file
}

// RunPod runs a pod of the environment's default runtime and returns when it
// is ready. config adds to, or replaces, what the pod must have; it may be nil.
// Names are not shared by pods that exist.
func (e *Env) RunPod(ctx context.Context, name string, config Object) (*Pod, error) {
	return e.RunPodOn(ctx, "", name, config)
}

// RunPodOn is RunPod with a runtime handler; empty is the default one.
func (e *Env) RunPodOn(ctx context.Context, runtime, name string, config Object) (*Pod, error) {
	p := &Pod{LogDir: filepath.Join(e.Dir, "pods", name), env: e}
	if err := os.MkdirAll(p.LogDir, 0o755); err != nil {
		return nil, err
	}
	all := Object{
		"metadata":      Object{"name": name, "namespace": "default", "uid": name, "attempt": 1},
		"log_directory": p.LogDir,
		"linux":         Object{},
	}
	maps.Copy(all, config)
	var err error
	if p.config, err = writeJSON(p.LogDir, "pod.json", all); err != nil {
		return nil, err
	}
	if p.ID, err = e.crictlID(ctx, "runp", "--runtime", runtime, p.config); err != nil {
		return nil, err
	}
	return p, nil
}

// Create creates a container of the pod without starting it, pulls the image
// if need be, and returns the container's id. config adds to, or replaces, its
// name, image and log path; it may be nil.
func (p *Pod) Create(ctx context.Context, name, image string, config Object) (string, error) {
	all := Object{
		"metadata": Object{"name": name, "attempt": 1},
		"image":    Object{"image": image},
		"log_path": name + ".log",
		"linux":    Object{},
	}
	maps.Copy(all, config)
	file, err := writeJSON(p.LogDir, name+".json", all)
	if err != nil {
		return "", err
	}
	return p.env.crictlID(ctx, "create", "--with-pull", p.ID, file, p.config)
}

// Run creates and starts a container, as Create does.
func (p *Pod) Run(ctx context.Context, name, image string, config Object) (string, error) {
	id, err := p.Create(ctx, name, image, config)
	if err != nil {
		return "", err
	}
	_, err = p.env.Crictl(ctx, "start", id).Run()
	return id, err
}

// Remove stops the pod and removes it with its containers.
func (p *Pod) Remove(ctx context.Context) error {
	_, stopErr := p.env.Crictl(ctx, "stopp", p.ID).Run()
	_, err := p.env.Crictl(ctx, "rmp", "--force", p.ID).Run()
	return errors.Join(stopErr, err)
}

// crictlID runs a crictl command that prints an id.
func (e *Env) crictlID(ctx context.Context, args ...string) (string, error) {
	out, err := e.Crictl(ctx, args...).Run()
	if err != nil {
		return "", err
	}
	id := strings.TrimSpace(out)
	if len(id) != 64 {
		return "", fmt.Errorf("crictl %s printed %q; want an id", args[0], out)
	}
	return id, nil
}

func writeJSON(dir, name string, o Object) (string, error) {
	b, err := json.MarshalIndent(o, "", "  ")
	if err != nil {
		return "", fmt.Errorf("write %s: %w", name, err)
	}
	file := filepath.Join(dir, name)
	return file, os.WriteFile(file, b, 0o644)
}
