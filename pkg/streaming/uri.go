package streaming

import (
	"fmt"
	"net/url"
	"path"
	"strings"

	"github.com/containerd/errdefs"
)

// scheme is that of the shim's own socket.
const scheme = "ttrpc+unix"

// maxID bounds a stream's id, in bytes. CRI's are a container's or an exec's
// id, of 64 bytes, and the stream's name.
const maxID = 1024

// IsURI reports whether a stdio field of a request names a stream rather than
// a file or a logger: <ttrpc|grpc>+<transport>://<address>?streaming_id=<id>.
func IsURI(s string) bool {
	scheme, _, ok := strings.Cut(s, "://")
	return ok && (strings.HasPrefix(scheme, "ttrpc+") || strings.HasPrefix(scheme, "grpc+"))
}

// ID returns the id in a stream's URI. Only URIs of the service's own socket
// have one: the error is errdefs.ErrNotImplemented for another transport and
// errdefs.ErrInvalidArgument otherwise.
func (s *Service) ID(uri string) (string, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if u.Scheme != scheme {
		return "", fmt.Errorf("transport %s is not served, only %s is: %w", u.Scheme, scheme, errdefs.ErrNotImplemented)
	}
	if s.address == "" {
		return "", fmt.Errorf("the shim has no socket of its own: %w", errdefs.ErrFailedPrecondition)
	}
	if u.Host != "" || u.User != nil || u.Opaque != "" || path.Clean(u.Path) != path.Clean(s.address) {
		return "", fmt.Errorf("not this shim's address, %s://%s: %w", scheme, s.address, errdefs.ErrInvalidArgument)
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	id := query.Get("streaming_id")
	return id, checkID(id)
}

func checkID(id string) error {
	switch {
	case id == "":
		return fmt.Errorf("no streaming_id: %w", errdefs.ErrInvalidArgument)
	case len(id) > maxID:
		return fmt.Errorf("streaming_id of %d bytes, at most %d are allowed: %w", len(id), maxID, errdefs.ErrInvalidArgument)
	}
	return nil
}
