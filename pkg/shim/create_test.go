package shim

import (
	"errors"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/vmrt/vmrt/pkg/guestspec"
)

func TestNameSources(t *testing.T) {
	plan := &guestspec.Plan{
		Spec: &specs.Spec{Mounts: []specs.Mount{
			{Source: "proc"}, {Source: "/run/vmrt/share/box.1/mounts/1"}, {Source: "/run/vmrt/share/box.1/mounts/10"},
		}},
		Binds: []guestspec.Bind{
			{Mount: 1, Source: "/srv/one", Destination: "/bin"},
			{Mount: 2, Source: "/srv/ten", Destination: "/"},
		},
	}
	for _, tt := range []struct{ guest, want string }{
		{
			"OCI runtime create failed: mount `/run/vmrt/share/box.1/mounts/1` to `bin`: not a directory",
			`OCI runtime create failed: error mounting "/srv/one" to rootfs at "/bin": not a directory`,
		},
		{
			"OCI runtime create failed: mount `/run/vmrt/share/box.1/mounts/10` to ``: invalid argument",
			`OCI runtime create failed: error mounting "/srv/ten" to rootfs at "/": invalid argument`,
		},
		{"mount `/run/vmrt/share/box.1/mounts/10` to `", "mount `/run/vmrt/share/box.1/mounts/10` to `"},
		{"mount `proc` to `proc`: busy", "mount `proc` to `proc`: busy"},
	} {
		got := nameSources(status.Error(codes.InvalidArgument, tt.guest), plan)
		if st, _ := status.FromError(got); st.Code() != codes.InvalidArgument || st.Message() != tt.want {
			t.Errorf("nameSources(%q) = %v; want %q of the same code", tt.guest, got, tt.want)
		}
	}
	other := errors.New("no status")
	if got := nameSources(other, plan); got != other {
		t.Errorf("nameSources(%v) = %v; want it as it is", other, got)
	}
}
