package shim

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
)

// The client's side is errgrpc.ToNative.
func TestToGRPC(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
		kind error
	}{
		{fmt.Errorf("open a: %w: %w", os.ErrNotExist, errdefs.ErrFailedPrecondition), "open a: file does not exist: failed precondition", errdefs.ErrFailedPrecondition},
		{fmt.Errorf("b: %w", errors.Join(fmt.Errorf("c: %w", errdefs.ErrNotFound), nil)), "b: c: not found", errdefs.ErrNotFound},
		{errdefs.ErrFailedPrecondition.WithMessage("cannot exec in a stopped state"), "cannot exec in a stopped state", errdefs.ErrFailedPrecondition},
		{errors.New("cannot resize a stopped container"), "cannot resize a stopped container", errdefs.ErrUnknown},
	} {
		got := errgrpc.ToNative(toGRPC(tt.err))
		if got.Error() != tt.want || !errors.Is(got, tt.kind) {
			t.Errorf("client sees %q of %v; want %q of kind %v", got, tt.err, tt.want, tt.kind)
		}
	}
	if got := toGRPC(nil); got != nil {
		t.Errorf("toGRPC(nil) = %v; want nil", got)
	}
}
