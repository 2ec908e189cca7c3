//go:build !(linux && amd64)

package accel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"time"
)

func probe(context.Context, string, time.Duration) verdict { return verdict{err: unsupported()} }

func nodeOf(fs.FileInfo) (string, error) { return "", unsupported() }

func unsupported() error {
	return fmt.Errorf("KVM probe on %s/%s: %w", runtime.GOOS, runtime.GOARCH, errors.ErrUnsupported)
}
