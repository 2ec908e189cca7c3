package shim

import (
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/status"
)

// toGRPC is what every error passes on its way to containerd: its kind and its
// text. The details that errgrpc adds are left out: from those of an error with
// both a cause and a kind the client makes a text that says the kind once more,
// on a line of its own.
func toGRPC(err error) error {
	st, ok := status.FromError(errgrpc.ToGRPC(err))
	if err == nil || !ok {
		return err
	}
	p := st.Proto() // a copy
	p.Details = nil
	return status.ErrorProto(p)
}
