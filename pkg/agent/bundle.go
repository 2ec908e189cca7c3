package agent

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/agent/fsmount"
)

// maxConfig bounds a config.json, in bytes. A ttrpc message is no larger.
const maxConfig = 4 << 20

// writeBundle makes the bundle of a container below root.
func writeBundle(root, id string, config []byte) error {
	if err := api.CheckID(id); err != nil {
		return fmt.Errorf("write bundle: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(config) == 0 || len(config) > maxConfig {
		return fmt.Errorf("write bundle %s: config of %d bytes: want 1 to %d: %w", id, len(config), maxConfig, errdefs.ErrInvalidArgument)
	}
	dir := filepath.Join(root, id)
	// A container with a user namespace must be able to pass through.
	if err := os.MkdirAll(filepath.Join(dir, "rootfs"), 0o711); err != nil {
		return fmt.Errorf("write bundle %s: %w", id, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), config, 0o600); err != nil {
		return fmt.Errorf("write bundle %s: %w", id, err)
	}
	return nil
}

// removeBundle removes it with whatever is still mounted there.
func removeBundle(root, id string) error {
	if err := api.CheckID(id); err != nil {
		return fmt.Errorf("remove bundle: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if err := fsmount.RemoveAll(filepath.Join(root, id)); err != nil {
		return fmt.Errorf("remove bundle %s: %w", id, err)
	}
	return nil
}
