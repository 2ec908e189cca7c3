package env

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/vmrt/vmrt/hack/tools"
	"github.com/vmrt/vmrt/tests/env/image"
)

// initProgram is what `docker run --init` runs in a container.
const initProgram = "/usr/bin/tini-static"

// dockerPrograms returns the folders of Docker's programs, which it builds or
// fetches when they are missing.
func dockerPrograms(ctx context.Context, cfg Config) ([]string, error) {
	var dirs []string
	switch cfg.Docker {
	case "26":
	case "28":
		dir, err := tools.Build(ctx, "docker", cfg.Progress)
		if err != nil {
			return nil, err
		}
		dirs = append(dirs, dir)
	default:
		return nil, fmt.Errorf("start environment: no Docker %q", cfg.Docker)
	}
	root, err := tools.Root()
	if err != nil {
		return nil, err
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(root, "hack", "docker.sh"))
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("fetch Docker: %w: %s", err, stderr.String())
	}
	return append(dirs, strings.TrimSpace(string(out))), nil
}

// Docker returns a docker command on the environment's dockerd. Config must
// have had Docker.
func (e *Env) Docker(ctx context.Context, args ...string) *Cmd {
	return e.Command(ctx, "docker", args...)
}

// DockerLoad gives dockerd images.
func (e *Env) DockerLoad(ctx context.Context, images ...image.Image) error {
	var buf bytes.Buffer
	if err := image.Write(&buf, images...); err != nil {
		return err
	}
	cmd := e.Docker(ctx, "load", "-q")
	cmd.Stdin = &buf
	_, err := cmd.Run()
	return err
}

func (e *Env) dockerDir() string    { return filepath.Join(e.Dir, "docker") }
func (e *Env) dockerSocket() string { return filepath.Join(e.dockerDir(), "docker.sock") }
func (e *Env) dockerLog() string    { return filepath.Join(e.Dir, "dockerd.log") }

// DockerLog returns what dockerd logged.
func (e *Env) DockerLog() string {
	b, err := os.ReadFile(e.dockerLog())
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// startDocker starts dockerd on the environment's containerd and waits until
// it accepts clients. It ends with the environment.
func (e *Env) startDocker(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	config := filepath.Join(e.dockerDir(), "daemon.json")
	large := filepath.Join(e.dockerDir(), "large.toml")
	b, err := json.Marshal(Object{
		"hosts":      []string{"unix://" + e.dockerSocket()},
		"containerd": e.Socket,
		"data-root":  filepath.Join(e.dockerDir(), "data"),
		"exec-root":  filepath.Join(e.dockerDir(), "exec"),
		"pidfile":    filepath.Join(e.dockerDir(), "pid"),
		"init-path":  initProgram,
		"debug":      true,
		"runtimes": Object{
			"vmrt": Object{"runtimeType": "io.containerd.vmrt.v2"},
			// Another configuration than that of Config.VMRT.
			"vmrt-large": Object{"runtimeType": "io.containerd.vmrt.v2", "options": Object{"ConfigPath": large}},
		},
	})
	if err != nil {
		return err
	}
	err = errors.Join(
		os.Mkdir(e.dockerDir(), 0o755), os.WriteFile(config, b, 0o644),
		os.WriteFile(large, []byte(e.cfg.VMRT+"\nmemory_mib = 400\n"), 0o644),
	)
	if err != nil {
		return err
	}
	log, err := os.Create(e.dockerLog())
	if err != nil {
		return err
	}
	defer log.Close()
	// Not bound to ctx: dockerd outlives the start.
	cmd := e.Command(context.Background(), "dockerd", "--config-file", config)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start dockerd: %w", err)
	}
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		_ = cmd.Wait() // it was killed, or the log says why it ended
	}()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if conn, err := net.Dial("unix", e.dockerSocket()); err == nil {
			conn.Close()
			break
		}
		select {
		case <-tick.C: // as for containerd
		case <-exited:
			return fmt.Errorf("start dockerd: it ended: %s", e.DockerLog())
		case <-ctx.Done():
			return fmt.Errorf("start dockerd: %w: %s", ctx.Err(), e.DockerLog())
		}
	}
	// The socket is there before the daemon is ready, which answers then.
	_, err = e.Docker(ctx, "version").Run()
	return err
}
