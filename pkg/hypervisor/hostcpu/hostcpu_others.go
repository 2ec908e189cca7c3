//go:build !(linux && amd64)

package hostcpu

import (
	"errors"
	"fmt"
	"runtime"
)

// TSCKHz is not implemented on this platform.
func TSCKHz() (uint64, error) { return 0, unsupported() }

// Model is not implemented on this platform.
func Model() (string, error) { return "", unsupported() }

func unsupported() error {
	return fmt.Errorf("processor facts on %s/%s: %w", runtime.GOOS, runtime.GOARCH, errors.ErrUnsupported)
}
