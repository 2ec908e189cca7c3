package state

import (
	"fmt"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/vmrt/vmrt/api"
)

// pointerFile is the name of the pointer in a bundle.
const pointerFile = "vmrt-sandbox.json"

// pointer leads from a container's bundle to its sandbox.
type pointer struct {
	Version   int    `json:"version"`
	StateDir  string `json:"stateDir"`
	Namespace string `json:"namespace"`
	ID        string `json:"id"`
}

func (p *pointer) form() int { return p.Version }

func (p *pointer) check() error {
	if !filepath.IsAbs(p.StateDir) {
		return fmt.Errorf("state directory %q", p.StateDir)
	}
	for _, name := range []string{p.Namespace, p.ID} {
		if err := api.CheckID(name); err != nil {
			return err
		}
	}
	return nil
}

// Link writes into a container's bundle the pointer to its sandbox's state.
// containerd removes it with the bundle.
func (s Store) Link(bundle, namespace, id string) error {
	p := &pointer{Version: version, StateDir: s.root, Namespace: namespace, ID: id}
	if err := p.check(); err != nil {
		return fmt.Errorf("link bundle %s to sandbox %s/%s: %w: %w", bundle, namespace, id, err, errdefs.ErrInvalidArgument)
	}
	if err := replace(filepath.Join(bundle, pointerFile), p); err != nil {
		return fmt.Errorf("link bundle %s to sandbox %s/%s: %w", bundle, namespace, id, err)
	}
	return nil
}

// FromBundle follows the pointer that Link wrote. It is errdefs.ErrNotFound
// when there is none, or nothing where it leads to. When the pointer is good
// and the state is errdefs.ErrDataLoss or errdefs.ErrNotFound, the sandbox has
// its ID and Namespace alone, beside the error.
func FromBundle(bundle string) (Store, *Sandbox, error) {
	p := new(pointer)
	if err := read(filepath.Join(bundle, pointerFile), p, p.check); err != nil {
		return Store{}, nil, fmt.Errorf("find sandbox of bundle %s: %w", bundle, err)
	}
	s := Open(p.StateDir)
	sb, err := s.Load(p.Namespace, p.ID)
	if errdefs.IsDataLoss(err) || errdefs.IsNotFound(err) {
		sb = &Sandbox{ID: p.ID, Namespace: p.Namespace}
	}
	return s, sb, err
}
