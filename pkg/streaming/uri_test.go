package streaming

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestID(t *testing.T) {
	s := New("/run/containerd/s/0123")
	const own = "ttrpc+unix:///run/containerd/s/0123"
	for _, tc := range []struct {
		uri, id, want string
		is            func(error) bool
	}{
		{uri: own + "?streaming_id=web-stdout", id: "web-stdout"},
		{uri: "ttrpc+unix:////run/containerd/s/0123?streaming_id=web-stdout", id: "web-stdout"},
		{uri: own + "?streaming_id=a%20b", id: "a b"},
		{uri: own, want: "no streaming_id", is: errdefs.IsInvalidArgument},
		{uri: own + "?streaming_id=", want: "no streaming_id", is: errdefs.IsInvalidArgument},
		{uri: own + "?stream_id=a", want: "no streaming_id", is: errdefs.IsInvalidArgument},
		{uri: own + "?streaming_id=" + strings.Repeat("x", 1025), want: "streaming_id of 1025 bytes, at most 1024 are allowed", is: errdefs.IsInvalidArgument},
		{uri: own + "?streaming_id=%zz", want: "invalid URL escape", is: errdefs.IsInvalidArgument},
		{uri: "ttrpc+unix:///run/containerd/s/4567?streaming_id=a", want: "not this shim's address, ttrpc+unix:///run/containerd/s/0123", is: errdefs.IsInvalidArgument},
		{uri: "ttrpc+unix://host/run/containerd/s/0123?streaming_id=a", want: "not this shim's address", is: errdefs.IsInvalidArgument},
		{uri: "ttrpc+unix://?streaming_id=a", want: "not this shim's address", is: errdefs.IsInvalidArgument},
		{uri: "grpc+unix:///run/containerd/s/0123?streaming_id=a", want: "transport grpc+unix is not served, only ttrpc+unix is", is: errdefs.IsNotImplemented},
		{uri: "ttrpc+vsock://3:1?streaming_id=a", want: "transport ttrpc+vsock is not served", is: errdefs.IsNotImplemented},
		{uri: "ttrpc+unix://%zz", want: "invalid URL escape", is: errdefs.IsInvalidArgument},
	} {
		if !IsURI(tc.uri) {
			t.Errorf("IsURI(%s) = false", tc.uri)
		}
		id, err := s.ID(tc.uri)
		if tc.is == nil {
			if id != tc.id || err != nil {
				t.Errorf("ID(%s) = %q, %v; want %q", tc.uri, id, err, tc.id)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), tc.want) || !tc.is(err) {
			t.Errorf("ID(%.80s) = %q, %v; want %s", tc.uri, id, err, tc.want)
		}
	}
	if _, err := New("").ID(own + "?streaming_id=a"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("ID() without a socket = %v; want a failed precondition", err)
	}
	for _, other := range []string{"", "/run/fifo", "ttrpc+unix", "fifo:///run/fifo", "binary:///bin/x", "file:///x", "/ttrpc+unix://x"} {
		if IsURI(other) {
			t.Errorf("IsURI(%q) = true", other)
		}
	}
}

func FuzzID(f *testing.F) {
	f.Add("ttrpc+unix:///run/s?streaming_id=a")
	f.Add("grpc+vsock://3:1?streaming_id=a;b")
	f.Add("ttrpc+unix://u@h/../run/./s?streaming_id=%00")
	s := New("/run/s")
	f.Fuzz(func(t *testing.T, uri string) {
		id, err := s.ID(uri)
		switch {
		case err == nil && (id == "" || len(id) > maxID || !strings.HasPrefix(strings.ToLower(uri), "ttrpc+unix:")):
			t.Errorf("ID(%q) = %q", uri, id)
		case err != nil && !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err):
			t.Errorf("ID(%q) = %v; want an invalid argument or not implemented", uri, err)
		}
	})
}
