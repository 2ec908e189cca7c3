package env

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"text/template"
	"time"
)

//go:embed config.toml.tmpl
var configTemplate string

//go:embed cni.conflist.tmpl
var cniTemplate string

// configData is what the templates see.
type configData struct {
	Dir, Socket, Snapshotter string
	CNIBin, Runtime          string
	Imports                  []string
	Extra                    string
}

// writeConfig writes the configuration of containerd, CNI, nerdctl and crictl.
func (e *Env) writeConfig() error {
	data := configData{
		Dir: e.Dir, Socket: e.Socket, Snapshotter: e.cfg.Snapshotter,
		CNIBin: filepath.Join(e.Dir, "no-cni"), Runtime: "runc", Imports: e.cfg.Imports, Extra: e.cfg.ExtraConfig,
	}
	if e.cfg.CRI != nil {
		data.Runtime = e.cfg.CRI.Runtime
	}
	for _, dir := range e.path {
		if strings.HasPrefix(filepath.Base(dir), "cni-") {
			data.CNIBin = dir
		}
	}
	cni := filepath.Join(e.Dir, "cni.d")
	if err := os.MkdirAll(cni, 0o755); err != nil {
		return err
	}
	for name, text := range map[string]string{
		e.configPath():                         configTemplate,
		filepath.Join(cni, "10-test.conflist"): cniTemplate,
		e.nerdctlConfig():                      nerdctlTemplate,
		e.crictlConfig():                       crictlTemplate,
	} {
		if err := writeTemplate(name, text, data); err != nil {
			return err
		}
	}
	return nil
}

const nerdctlTemplate = `address = "{{.Socket}}"
data_root = "{{.Dir}}/nerdctl"
cni_path = "{{.CNIBin}}"
cni_netconfpath = "{{.Dir}}/nerdctl-cni.d"
snapshotter = "{{.Snapshotter}}"
cgroup_manager = "cgroupfs"
`

// The timeout, in seconds, is for each request: a virtual machine without KVM
// on a busy machine takes its time.
const crictlTemplate = `runtime-endpoint: unix://{{.Socket}}
image-endpoint: unix://{{.Socket}}
timeout: 120
`

func (e *Env) configPath() string    { return filepath.Join(e.Dir, "containerd.toml") }
func (e *Env) nerdctlConfig() string { return filepath.Join(e.Dir, "nerdctl.toml") }
func (e *Env) crictlConfig() string  { return filepath.Join(e.Dir, "crictl.yaml") }

func writeTemplate(name, text string, data configData) (err error) {
	t, err := template.New(filepath.Base(name)).Parse(text)
	if err != nil {
		return err
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return t.Execute(f, data)
}

// startContainerd starts containerd and waits until it accepts clients.
func (e *Env) startContainerd(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	log, err := os.OpenFile(e.logPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	// Not bound to ctx: containerd outlives the start.
	cmd := e.Command(context.Background(), "containerd", "--config", e.configPath(), "--log-level", "debug")
	cmd.Env = append(cmd.Env, e.cfg.Env...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start containerd: %w", err)
	}
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		_ = cmd.Wait() // it was killed, or the log says why it ended
	}()
	e.mu.Lock()
	e.containerd, e.exited = cmd, exited
	e.mu.Unlock()
	// containerd announces readiness to systemd alone; a socket that can be
	// dialled is the next best thing.
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if conn, err := net.Dial("unix", e.Socket); err == nil {
			return conn.Close()
		}
		select {
		case <-tick.C:
		case <-exited:
			return fmt.Errorf("start containerd: it ended: %s", e.LogTail(5))
		case <-ctx.Done():
			return fmt.Errorf("start containerd: %w: %s", ctx.Err(), e.LogTail(5))
		}
	}
}

// stopContainerd ends containerd alone, as SIGKILL would: shims live on. It is
// a no-op when containerd does not run.
func (e *Env) stopContainerd() error {
	e.mu.Lock()
	cmd, exited := e.containerd, e.exited
	e.containerd, e.exited = nil, nil
	e.mu.Unlock()
	if cmd == nil {
		return nil
	}
	if err := cmd.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill containerd: %w", err)
	}
	select {
	case <-exited:
		return nil
	case <-time.After(10 * time.Second):
		return errors.New("kill containerd: it did not end within 10 s")
	}
}

// RestartContainerd kills containerd, leaving the shims alone, and starts it
// again.
func (e *Env) RestartContainerd(ctx context.Context) error {
	return e.WithoutContainerd(ctx, func() error { return nil })
}

// WithoutContainerd is RestartContainerd, with f called between the two.
func (e *Env) WithoutContainerd(ctx context.Context, f func() error) error {
	if err := e.stopContainerd(); err != nil {
		return err
	}
	if err := f(); err != nil {
		return err
	}
	if err := os.Remove(e.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return e.startContainerd(ctx)
}
