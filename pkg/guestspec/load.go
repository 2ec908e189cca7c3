package guestspec

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

const (
	// maxLoad bounds a config.json on the host, in bytes. containerd's own
	// limit is that of a gRPC message, 16 MiB.
	maxLoad = 16 << 20
	// MaxConfig bounds the guest's config.json, in bytes: it goes to the agent
	// in one ttrpc message, of at most 4 MiB, together with the container's id.
	MaxConfig = 4<<20 - 4<<10
)

// Load reads the config.json of a bundle. It is errdefs.ErrNotFound when the
// bundle has none.
func Load(bundle string) (*specs.Spec, error) {
	name := filepath.Join(bundle, "config.json")
	f, err := os.Open(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil, errdefs.ErrNotFound.WithMessage(fmt.Sprintf("JSON specification file %s not found", name))
	}
	if err != nil {
		return nil, fmt.Errorf("read spec: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxLoad+1))
	if err != nil {
		return nil, fmt.Errorf("read spec: %w", err)
	}
	if len(b) > maxLoad {
		return nil, invalid("spec %s: more than %d MiB", name, maxLoad>>20)
	}
	spec := new(specs.Spec)
	if err := json.Unmarshal(b, spec); err != nil {
		return nil, invalid("spec %s: %v", name, err)
	}
	return spec, nil
}

// Encode returns a guest's spec as the agent's WriteBundle takes it.
func Encode(spec *specs.Spec) ([]byte, error) {
	b, err := json.Marshal(spec)
	if err != nil {
		return nil, fmt.Errorf("encode spec: %w", err)
	}
	if len(b) > MaxConfig {
		return nil, invalid("spec of %d bytes: a virtual machine takes at most %d", len(b), MaxConfig)
	}
	return b, nil
}
