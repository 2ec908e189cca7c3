package env

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"

	"github.com/vmrt/vmrt/hack/tools"
	"github.com/vmrt/vmrt/tests/env/image"
	"github.com/vmrt/vmrt/tests/env/registry"
)

// CRI makes an environment one in which pods run: with crictl, the CNI plugins
// (a bridge with portmap), runc, this project's drop-in file for containerd,
// and a registry. The registry is containerd's mirror of all registries, so
// that images have their usual names; it holds the image of the pause
// container and those of Images, and serves as long as the environment lives.
type CRI struct {
	// Runtime is the handler that pods get which name none: "runc" (the
	// default) or "vmrt". Both can be named.
	Runtime string
	// Sandboxer says how vmrt's sandboxes are run: "podsandbox" (the default)
	// or "shim". runc knows the first alone.
	Sandboxer string
	// Streaming makes containerd carry stdio of vmrt's containers over streams
	// instead of FIFOs. It takes the sandboxer "shim".
	Streaming bool
	// Images are what can be pulled.
	Images []image.Image
}

// Modes are the values of CRI.Sandboxer.
var Modes = []string{"podsandbox", "shim"}

// useCRI checks cfg.CRI, fills in defaults, and makes cfg what pods need.
func (cfg *Config) useCRI() error {
	c := *cfg.CRI
	if c.Runtime == "" {
		c.Runtime = "runc"
	}
	if c.Sandboxer == "" {
		c.Sandboxer = Modes[0]
	}
	if !slices.Contains([]string{"runc", "vmrt"}, c.Runtime) {
		return fmt.Errorf("no runtime handler %q: want runc or vmrt", c.Runtime)
	}
	if !slices.Contains(Modes, c.Sandboxer) {
		return fmt.Errorf("no sandboxer %q: want one of %q", c.Sandboxer, Modes)
	}
	if c.Runtime == "runc" && c.Sandboxer == "shim" {
		return errors.New("runc's shim makes no sandboxes: want the sandboxer podsandbox")
	}
	if c.Streaming && c.Sandboxer != "shim" {
		return fmt.Errorf("no streams with the sandboxer %s: want shim", c.Sandboxer)
	}
	cfg.CRI = &c
	cfg.Tools = slices.Clone(cfg.Tools)
	for _, tool := range []string{"cni", "critools", "runc"} {
		if !slices.Contains(cfg.Tools, tool) {
			cfg.Tools = append(cfg.Tools, tool)
		}
	}
	return nil
}

// prepareCRI starts the registry and writes the files for it and for the
// runtimes. The namespaces must be there.
func (e *Env) prepareCRI(ctx context.Context) error {
	pause, err := image.Pause(ctx)
	if err != nil {
		return err
	}
	reg, err := registry.New(append([]image.Image{pause}, e.cfg.CRI.Images...)...)
	if err != nil {
		return err
	}
	l, err := e.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	e.registry = &http.Server{Handler: reg}
	go func() { _ = e.registry.Serve(l) }() // until Stop closes it
	if err := e.writeMirror("http://" + l.Addr().String()); err != nil {
		return err
	}
	dropIn, err := e.dropIn()
	if err != nil {
		return err
	}
	e.cfg.Imports = append(slices.Clone(e.cfg.Imports), dropIn)
	return nil
}

// Listen listens at an address of the environment's network.
func (e *Env) Listen(network, address string) (l net.Listener, err error) {
	err = e.ns.onNetwork(func() (err error) {
		l, err = net.Listen(network, address)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen at %s within the environment: %w", address, err)
	}
	return l, nil
}

// ListenPacket is Listen for datagrams.
func (e *Env) ListenPacket(network, address string) (c net.PacketConn, err error) {
	err = e.ns.onNetwork(func() (err error) {
		c, err = net.ListenPacket(network, address)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen at %s within the environment: %w", address, err)
	}
	return c, nil
}

// Dial connects to an address in the environment's network.
func (e *Env) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = e.ns.onNetwork(func() (err error) {
		// One address, so that the calling thread is the one that connects.
		conn, err = (&net.Dialer{FallbackDelay: -1}).DialContext(ctx, network, address)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("connect to %s within the environment: %w", address, err)
	}
	return conn, nil
}

// writeMirror makes url the mirror of all registries.
func (e *Env) writeMirror(url string) error {
	dir := filepath.Join(e.Dir, "certs.d", "_default")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	const hosts = "server = %[1]q\n[host.%[1]q]\n  capabilities = [\"pull\", \"resolve\"]\n"
	return os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(fmt.Sprintf(hosts, url)), 0o644)
}

// dropIn returns a file that makes this project's runtime known to containerd:
// a copy of the one that users install, with the lines that they uncomment.
func (e *Env) dropIn() (string, error) {
	root, err := tools.Root()
	if err != nil {
		return "", err
	}
	b, err := os.ReadFile(filepath.Join(root, "deploy", "containerd", "vmrt.toml"))
	if err != nil {
		return "", err
	}
	for _, l := range []struct {
		wanted bool
		line   string
	}{
		{e.cfg.CRI.Sandboxer == "shim", `sandboxer = "shim"`},
		{e.cfg.CRI.Sandboxer == "shim", `disable_pause_image_pull = true`},
		{e.cfg.CRI.Streaming, `io_type = "streaming"`},
	} {
		if !l.wanted {
			continue
		}
		comment := []byte("#" + l.line)
		if bytes.Count(b, comment) != 1 {
			return "", fmt.Errorf("deploy/containerd/vmrt.toml has not one line %q", comment)
		}
		b = bytes.Replace(b, comment, []byte(l.line), 1)
	}
	file := filepath.Join(e.Dir, "conf.d", "vmrt.toml")
	return file, errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, b, 0o644))
}

// Crictl returns a crictl command on the environment's containerd. Config must
// have had CRI.
func (e *Env) Crictl(ctx context.Context, args ...string) *Cmd {
	return e.Command(ctx, "crictl", args...)
}
