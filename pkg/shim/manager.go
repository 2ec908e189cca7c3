package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	containerdshim "github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/log"

	"github.com/vmrt/vmrt/pkg/config"
)

// RuntimeName is what containerd knows this runtime by.
const RuntimeName = "io.containerd.vmrt.v2"

// taskAPIVersion is containerd.task.v3.
const taskAPIVersion = 3

// groupAnnotations name the sandbox that a container belongs to; containers of
// one sandbox share one shim and one virtual machine. The first that is present
// counts.
var groupAnnotations = []string{
	"io.kubernetes.cri.sandbox-id",
}

// ProcessOptions is how containerd's shim library runs this shim: it does not
// reap children itself, because os/exec waits for each of them, and it is no
// subreaper, because no orphan is ever handed to it.
func ProcessOptions(c *containerdshim.Config) {
	c.NoReaper = true
	c.NoSubreaper = true
}

// NewManager returns what containerd calls outside a running shim: start,
// delete and -info.
func NewManager() containerdshim.Shim { return manager{} }

type manager struct{}

func (manager) Name() string { return RuntimeName }

// Start implements `shim start` in the bundle's folder: it makes the shim's
// socket and starts the shim on it, or returns the socket of the shim that
// already serves this sandbox.
func (manager) Start(ctx context.Context, params *bootapi.BootstrapParams) (*bootapi.BootstrapResult, error) {
	group, err := sandboxOfBundle(".", params.GetInstanceID())
	if err != nil {
		return nil, err
	}
	dir := params.GetSocketDir()
	if dir == "" {
		dir = filepath.Join(defaults.DefaultStateDir, "s")
	}
	address, err := containerdshim.CreateSocketAddress(ctx, dir, params.GetContainerdGrpcAddress(), group, false)
	if err != nil {
		return nil, err
	}
	result := &bootapi.BootstrapResult{Version: taskAPIVersion, Protocol: "ttrpc", Address: address}

	l, err := listen(address)
	if errors.Is(err, errServed) {
		return result, nil
	}
	if err != nil {
		return nil, err
	}
	defer l.Close()
	if err := startServer(ctx, params, l); err != nil {
		_ = containerdshim.RemoveSocket(address)
		return nil, err
	}
	return result, nil
}

// errServed says that another shim listens on the address already.
var errServed = errors.New("socket is being served")

// listen makes the socket. One that a dead shim left is replaced.
func listen(address string) (*net.UnixListener, error) {
	l, err := containerdshim.NewSocket(address)
	if err == nil {
		return l, nil
	}
	if !containerdshim.SocketEaddrinuse(err) {
		return nil, fmt.Errorf("create shim socket: %w", err)
	}
	if containerdshim.CanConnect(address) {
		return nil, errServed
	}
	if err := containerdshim.RemoveSocket(address); err != nil {
		return nil, fmt.Errorf("remove the socket of a dead shim: %w", err)
	}
	if l, err = containerdshim.NewSocket(address); err != nil {
		return nil, fmt.Errorf("create shim socket: %w", err)
	}
	return l, nil
}

// startServer runs this binary again as the sandbox's shim, with l as file
// descriptor 3. It leads a process group of its own, so that a signal to
// containerd's group does not reach it.
func startServer(ctx context.Context, params *bootapi.BootstrapParams, l *net.UnixListener) error {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find the shim's own binary: %w", err)
	}
	f, err := l.File()
	if err != nil {
		return fmt.Errorf("duplicate shim socket: %w", err)
	}
	defer f.Close()
	// The listener's Close would unlink the socket that the server is to serve.
	l.SetUnlinkOnClose(false)

	args := []string{"-namespace", ns, "-id", params.GetInstanceID(), "-address", params.GetContainerdGrpcAddress()}
	if params.GetLogLevel() <= bootapi.LogLevel_LOG_LEVEL_DEBUG {
		args = append(args, "-debug")
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), "GOMAXPROCS=4")
	if os.Getenv("GODEBUG") == "" {
		// Nobody asks for a profile, whose table is memory of every pod.
		cmd.Env = append(cmd.Env, "GODEBUG=memprofilerate=0")
	}
	// The Sandbox API has the runtime options here only.
	for _, e := range params.GetExtensions() {
		if path, err := configPath(e.GetValue()); err == nil && path != "" {
			cmd.Env = append(cmd.Env, config.PathEnv+"="+path)
		}
	}
	cmd.ExtraFiles = []*os.File{f}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start shim: %w", err)
	}
	if err := containerdshim.AdjustOOMScore(cmd.Process.Pid); err != nil {
		// Needs CAP_SYS_RESOURCE, which nested installations lack.
		log.G(ctx).WithError(err).Debug("shim keeps its OOM score")
	}
	return cmd.Process.Release()
}

// sandboxOfBundle returns the id of the sandbox that the bundle's container
// belongs to: its own id when no annotation says otherwise.
func sandboxOfBundle(bundle, id string) (string, error) {
	f, err := os.Open(filepath.Join(bundle, "config.json"))
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			// A sandbox of the Sandbox API has no OCI spec.
			return id, nil
		}
		return "", err
	}
	defer f.Close()
	var spec struct {
		Annotations map[string]string `json:"annotations"`
	}
	if err := json.NewDecoder(f).Decode(&spec); err != nil {
		return "", fmt.Errorf("read config.json of container %s: %w", id, err)
	}
	for _, a := range groupAnnotations {
		if group := spec.Annotations[a]; group != "" {
			return group, nil
		}
	}
	return id, nil
}
