//go:build !linux

package qemu

import (
	"context"
	"errors"
	"fmt"
	"runtime"

	"github.com/vmrt/vmrt/pkg/hypervisor"
)

func launch(context.Context, Config, *hypervisor.Spec) (hypervisor.VM, error) {
	return nil, fmt.Errorf("QEMU on %s: %w", runtime.GOOS, errors.ErrUnsupported)
}
