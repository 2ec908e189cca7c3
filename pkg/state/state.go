// Package state keeps what must survive a killed shim: one file for each
// sandbox, <state dir>/<containerd namespace>/<sandbox id>/state.json, and in
// each container's bundle a pointer to it, so that `shim delete` can clean up
// from the bundle's path alone.
//
// A file is replaced whole, so that readers see the old content or the new. A
// sandbox's file is written by one process at a time: its shim, and once that
// is dead whoever cleans up. Everything else may be called by anybody at any
// time. What is read is checked, and an unreadable file is an error of kind
// errdefs.ErrDataLoss; nothing here repairs it. That what a file names still
// exists is not promised; Process tells a live process from another that has
// its pid.
package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/pkg/atomicfile"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/api"
)

const (
	stateFile = "state.json"
	// version is raised with every change that an older reader would
	// misunderstand.
	version = 1
	// maxFile bounds what is read, in bytes. Annotations and hooks of a pod's
	// containers make the most of a file.
	maxFile = 16 << 20
)

// Sandbox is everything that `shim delete` needs once the shim is dead.
type Sandbox struct {
	ID        string    `json:"id"`
	Namespace string    `json:"namespace"` // containerd's
	Created   time.Time `json:"created"`
	Shim      Process   `json:"shim"`
	// Socket is the path of the shim's socket; empty: unknown.
	Socket string  `json:"socket,omitempty"`
	VM     Process `json:"vm"`
	// Helpers are other processes of the sandbox: virtiofsd, anchors.
	Helpers []Process `json:"helpers,omitempty"`
	// Containers by id.
	Containers map[string]Container `json:"containers,omitempty"`
	// CgroupPath is for cgroup.Load.
	CgroupPath string `json:"cgroupPath,omitempty"`
	// NetNS is the path of the pod's network namespace; empty: one that goes
	// with the pod.
	NetNS string `json:"netns,omitempty"`
	// Kernel is the guest files' kind, Accelerator what runs the guest, Vsock
	// the transport, CID the guest's context id.
	Kernel      string `json:"kernel,omitempty"`
	Accelerator string `json:"accelerator,omitempty"`
	Vsock       string `json:"vsock,omitempty"`
	CID         uint32 `json:"cid,omitempty"`
}

// Container is one container of the sandbox.
type Container struct {
	// Bundle is the path of its bundle on the host.
	Bundle      string            `json:"bundle"`
	OCIVersion  string            `json:"ociVersion"`
	Annotations map[string]string `json:"annotations,omitempty"`
	// Poststop are the hooks that still have to run when it is deleted.
	Poststop []specs.Hook `json:"poststop,omitempty"`
	// Pid is the host pid that stands for the container.
	Pid int `json:"pid,omitempty"`
	// ExitStatus and ExitedAt are set once its init has exited.
	ExitStatus uint32    `json:"exitStatus,omitempty"`
	ExitedAt   time.Time `json:"exitedAt,omitzero"`
}

// document is the file: the sandbox and the version of its form.
type document struct {
	Version int `json:"version"`
	*Sandbox
}

// Store is a state directory. Copies are equal.
type Store struct{ root string }

// Open returns the store at stateDir, which need not exist.
func Open(stateDir string) Store { return Store{root: stateDir} }

// Dir is the sandbox's folder: <state dir>/<namespace>/<id>. It fails for names
// that are no path elements.
func (s Store) Dir(namespace, id string) (string, error) {
	for _, name := range []string{namespace, id} {
		if err := api.CheckID(name); err != nil {
			return "", fmt.Errorf("state of sandbox %s/%s: %w: %w", namespace, id, err, errdefs.ErrInvalidArgument)
		}
	}
	return filepath.Join(s.root, namespace, id), nil
}

// Create makes the sandbox's folder, for root alone. It is
// errdefs.ErrAlreadyExists when there is one.
func (s Store) Create(namespace, id string) (string, error) {
	dir, err := s.Dir(namespace, id)
	if err != nil {
		return "", err
	}
	// The namespace's folder goes with its last sandbox, perhaps just now.
	for range 1000 {
		err = os.MkdirAll(filepath.Dir(dir), 0o700)
		if errors.Is(err, os.ErrExist) || errors.Is(err, os.ErrNotExist) {
			continue // It went between two looks of MkdirAll.
		}
		if err != nil {
			return "", fmt.Errorf("create state of sandbox %s/%s: %w", namespace, id, err)
		}
		if err = os.Mkdir(dir, 0o700); !errors.Is(err, os.ErrNotExist) {
			break
		}
	}
	if errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("create state of sandbox %s/%s: %s: %w", namespace, id, dir, errdefs.ErrAlreadyExists)
	}
	if err != nil {
		return "", fmt.Errorf("create state of sandbox %s/%s: %w", namespace, id, err)
	}
	return dir, nil
}

// Save replaces the file of a sandbox whose folder exists.
func (s Store) Save(sb *Sandbox) error {
	dir, err := s.Dir(sb.Namespace, sb.ID)
	if err != nil {
		return err
	}
	if err := replace(filepath.Join(dir, stateFile), document{Version: version, Sandbox: sb}); err != nil {
		return fmt.Errorf("save state of sandbox %s/%s: %w", sb.Namespace, sb.ID, err)
	}
	return nil
}

// Load reads the file of a sandbox. It is errdefs.ErrNotFound when there is
// none, and errdefs.ErrDataLoss when it cannot be understood.
func (s Store) Load(namespace, id string) (*Sandbox, error) {
	dir, err := s.Dir(namespace, id)
	if err != nil {
		return nil, err
	}
	sb := new(Sandbox)
	if err := read(filepath.Join(dir, stateFile), &document{Sandbox: sb}, sb.check); err != nil {
		return nil, fmt.Errorf("load state of sandbox %s/%s: %w", namespace, id, err)
	}
	if sb.ID != id || sb.Namespace != namespace {
		return nil, fmt.Errorf("load state of sandbox %s/%s: it is of sandbox %s/%s: %w",
			namespace, id, sb.Namespace, sb.ID, errdefs.ErrDataLoss)
	}
	return sb, nil
}

// check holds what was read to what is written.
func (sb *Sandbox) check() error {
	for _, p := range append([]Process{sb.Shim, sb.VM}, sb.Helpers...) {
		if p.Pid < 0 {
			return fmt.Errorf("pid %d", p.Pid)
		}
	}
	for id, c := range sb.Containers {
		if err := api.CheckID(id); err != nil {
			return fmt.Errorf("container %w", err)
		}
		if !filepath.IsAbs(c.Bundle) {
			return fmt.Errorf("container %s: bundle %q", id, c.Bundle)
		}
	}
	return nil
}

// Remove removes the sandbox's folder with all that is in it. While something
// is mounted there it removes nothing and fails. Idempotent.
func (s Store) Remove(namespace, id string) error {
	dir, err := s.Dir(namespace, id)
	if err != nil {
		return err
	}
	if err := checkNoMount(dir); err != nil {
		return fmt.Errorf("remove state of sandbox %s/%s: %w", namespace, id, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove state of sandbox %s/%s: %w", namespace, id, err)
	}
	// The last one takes the namespace's folder along.
	_ = os.Remove(filepath.Dir(dir))
	return nil
}

// List loads all sandboxes, by namespace and id. The error joins what could
// not be loaded; the rest is returned beside it. A sandbox whose file is not
// there is about to be made, or to go, and is none.
func (s Store) List() ([]*Sandbox, error) {
	spaces, err := subfolders(s.root)
	if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", err)
	}
	var all []*Sandbox
	var errs []error
	for _, namespace := range spaces {
		ids, err := subfolders(filepath.Join(s.root, namespace))
		if err != nil {
			errs = append(errs, fmt.Errorf("list sandboxes: %w", err))
		}
		for _, id := range ids {
			sb, err := s.Load(namespace, id)
			switch {
			case err == nil:
				all = append(all, sb)
			case !errdefs.IsNotFound(err):
				errs = append(errs, err)
			}
		}
	}
	return all, errors.Join(errs...)
}

// subfolders lists the folders in dir by name; none when dir is absent.
func subfolders(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// replace writes v to a file in one step.
func replace(name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	f, err := atomicfile.New(name, 0o600)
	if err != nil {
		return err
	}
	if _, err := f.Write(b); err != nil {
		return errors.Join(err, f.Cancel())
	}
	return f.Close()
}

// read reads what replace wrote into v and checks it.
func read(name string, v interface{ form() int }, check func() error) error {
	// Not a FIFO, on which open would wait for ever.
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s: %w", name, errdefs.ErrNotFound)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return err
	}
	if len(b) > maxFile {
		return fmt.Errorf("%s: more than %d MiB: %w", name, maxFile>>20, errdefs.ErrDataLoss)
	}
	if err := decode(b, v, check); err != nil {
		return fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrDataLoss)
	}
	return nil
}

func decode(b []byte, v interface{ form() int }, check func() error) error {
	if err := json.Unmarshal(b, v); err != nil {
		return err
	}
	if v.form() != version {
		return fmt.Errorf("version %d: want %d", v.form(), version)
	}
	return check()
}

func (d *document) form() int { return d.Version }
