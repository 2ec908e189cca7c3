// Package env runs a private containerd for tests and for the demonstration:
// in mount, network, IPC, PID and cgroup namespaces of its own, with its state in
// one temporary folder, so that nothing of the machine changes and several
// environments run side by side.
//
// Inside an environment /run is empty at the start, /var/lib is an overlay
// that forgets, /sys and /proc show the environment's own network, processes
// and cgroups, and the loopback interface is up. Everything else is the
// machine's own, the environment's folder (Dir) included. Sockets and files
// below Dir have the same path on both sides; for all other paths use Path.
// Pids inside differ from those outside.
//
// When the process that started an environment ends, however it ends, the
// kernel kills every process of the environment and its mounts vanish. Only
// Stop also removes the folder and the cgroups.
//
// An Env's methods may be called from several goroutines, except Start, Stop
// and RestartContainerd.
package env

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/vmrt/vmrt/hack/tools"
)

// Config says what an environment is made of. The zero value is a containerd
// of the current branch with runc.
type Config struct {
	// Containerd is a branch of containerd: "2.4" (the default) or "2.3".
	// "lean" is the default one without CRI and runc's shim, which is built
	// in less time.
	Containerd string
	// BinDirs stand first in PATH, for containerd and for every command:
	// the folder of the shim under test belongs here.
	BinDirs []string
	// Tools are further programs of package tools that PATH shall hold:
	// "runc", "nerdctl", "cni", "critools". They are built when missing.
	Tools []string
	// Env holds further NAME=VALUE settings for containerd, hence for the
	// shims that it starts.
	Env []string
	// VMRT is the configuration of the runtime (TOML). It is written to a
	// file that VMRT_CONFIG names to containerd and to every command, so
	// that the machine's own configuration never matters.
	VMRT string
	// CRI, if not nil, has pods in mind: see its type. It adds to Tools what
	// pods need.
	CRI *CRI
	// Docker starts a dockerd on the containerd: "26" is Debian 13's, "28"
	// one of package tools. The client is Debian's. runc is taken from Tools.
	// Containers are in containerd's namespace "moby".
	Docker string
	// Snapshotter is the CRI plugin's and nerdctl's; "overlayfs" when empty.
	Snapshotter string
	// ExtraConfig is appended to containerd's configuration (TOML).
	ExtraConfig string
	// Imports are further configuration files of containerd.
	Imports []string
	// Progress receives a line for each long step. It may be nil.
	Progress io.Writer
}

// Env is a running environment.
type Env struct {
	// Dir is the environment's folder. It is removed by Stop.
	Dir string
	// Socket is the path of containerd's socket, for clients inside and
	// outside.
	Socket string

	cfg      Config
	id       string
	path     []string // of PATH
	ns       *namespaces
	cgroups  *cgroups
	registry *http.Server // nil without CRI
	baseline snapshot

	mu         sync.Mutex
	containerd *Cmd // nil while it does not run
	exited     chan struct{}
}

// containerdTools maps a branch to the tool that provides it.
var containerdTools = map[string]string{"": "containerd", "2.4": "containerd", "2.3": "containerd-2.3", "lean": "containerd-lean"}

// startTimeout bounds the start of containerd on a loaded machine.
const startTimeout = 60 * time.Second

// Start builds what is missing, makes the namespaces and starts containerd.
// It needs root.
func Start(ctx context.Context, cfg Config) (_ *Env, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("start environment: needs root")
	}
	tool, ok := containerdTools[cfg.Containerd]
	if !ok {
		return nil, fmt.Errorf("start environment: no containerd %q", cfg.Containerd)
	}
	if cfg.Snapshotter == "" {
		cfg.Snapshotter = "overlayfs"
	}
	if cfg.CRI != nil {
		if err := cfg.useCRI(); err != nil {
			return nil, fmt.Errorf("start environment: %w", err)
		}
	}
	e := &Env{cfg: cfg, path: append([]string(nil), cfg.BinDirs...)}
	for _, name := range append([]string{tool}, cfg.Tools...) {
		dir, err := tools.Build(ctx, name, cfg.Progress)
		if err != nil {
			return nil, err
		}
		e.path = append(e.path, dir)
	}
	if cfg.Docker != "" {
		dirs, err := dockerPrograms(ctx, cfg)
		if err != nil {
			return nil, err
		}
		e.path = append(e.path, dirs...)
	}
	e.path = append(e.path, "/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
	// An environment that came to be only in part is taken down like a
	// whole one.
	defer func() {
		if err != nil {
			err = fmt.Errorf("start environment: %w", err)
			if stopErr := e.Stop(); stopErr != nil {
				err = errors.Join(err, stopErr)
			}
		}
	}()
	if e.Dir, err = os.MkdirTemp("", "vmrt-env-"); err != nil {
		return nil, err
	}
	if err := os.Chmod(e.Dir, 0o755); err != nil {
		return nil, err
	}
	if strings.HasPrefix(e.Dir, "/run/") {
		return nil, fmt.Errorf("TMPDIR is %s: want a folder outside /run", filepath.Dir(e.Dir))
	}
	e.id = filepath.Base(e.Dir)
	e.Socket = filepath.Join(e.Dir, "containerd.sock")
	if e.cgroups, err = newCgroups(e.id); err != nil {
		return nil, err
	}
	if e.ns, err = newNamespaces(e.Dir, e.cgroups); err != nil {
		return nil, err
	}
	if err := os.WriteFile(e.vmrtConfig(), []byte(cfg.VMRT), 0o644); err != nil {
		return nil, err
	}
	if cfg.CRI != nil {
		if err := e.prepareCRI(ctx); err != nil {
			return nil, err
		}
	}
	if err := e.writeConfig(); err != nil {
		return nil, err
	}
	if err := e.startContainerd(ctx); err != nil {
		return nil, err
	}
	if cfg.Docker != "" {
		if err := e.startDocker(ctx); err != nil {
			return nil, err
		}
	}
	if e.baseline, err = e.snapshot(); err != nil {
		return nil, err
	}
	return e, nil
}

// Stop ends every process of the environment and removes its folder and its
// cgroups. It may be called on an environment that did not fully start, and
// again.
func (e *Env) Stop() error {
	var errs []error
	errs = append(errs, e.stopContainerd())
	if e.registry != nil {
		errs = append(errs, e.registry.Close())
	}
	if e.ns != nil {
		errs = append(errs, e.ns.close())
	}
	if e.cgroups != nil {
		errs = append(errs, e.cgroups.remove())
	}
	if e.Dir != "" && os.Getenv("VMRT_KEEP") == "" {
		errs = append(errs, os.RemoveAll(e.Dir))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("stop environment: %w", err)
	}
	return nil
}

// Path returns where this process finds a file that has the given path inside
// the environment: something below /run, or below /proc with an inside pid.
// inside starts with a slash. The result is valid until Stop.
func (e *Env) Path(inside string) string { return e.ns.path(inside) }

// Log returns what containerd, and so the shims that it forwards, logged.
func (e *Env) Log() string {
	b, err := os.ReadFile(e.logPath())
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// LogTail returns the last n lines of Log.
func (e *Env) LogTail(n int) string {
	lines := bytes.SplitAfter([]byte(e.Log()), []byte("\n"))
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return string(bytes.Join(lines, nil))
}

func (e *Env) vmrtConfig() string { return filepath.Join(e.Dir, "vmrt.toml") }

func (e *Env) logPath() string { return filepath.Join(e.Dir, "containerd.log") }
