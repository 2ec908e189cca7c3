// Package registry serves container images from memory, as the pull half of
// the OCI distribution specification asks for (spec.md, "Pull"): manifests by
// tag or digest, and blobs. Nothing can be pushed.
//
// It is meant as containerd's mirror of every registry: containerd names the
// registry that it wants in the parameter ns, and so images of several
// registries are told apart.
package registry

import (
	"bytes"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/vmrt/vmrt/tests/env/image"
)

// Registry is an http.Handler, and safe for use by several goroutines.
type Registry struct {
	manifests map[string][]byte // by "registry/name:tag" and "registry/name@digest"
	blobs     map[string][]byte // by digest
}

var _ http.Handler = (*Registry)(nil)

// New returns a registry that holds the images. Their names are full ones:
// "docker.io/library/busybox:latest".
func New(images ...image.Image) (*Registry, error) {
	r := &Registry{manifests: map[string][]byte{}, blobs: map[string][]byte{}}
	for _, img := range images {
		i := strings.LastIndex(img.Name, ":")
		if i < strings.LastIndex(img.Name, "/") || i < 0 {
			return nil, fmt.Errorf("image %q: want a name with a tag", img.Name)
		}
		s, err := img.OCI()
		if err != nil {
			return nil, err
		}
		r.manifests[img.Name] = s.Manifest
		r.manifests[img.Name[:i]+"@"+s.Digest] = s.Manifest
		for digest, b := range s.Blobs {
			r.blobs[digest] = b
		}
	}
	return r, nil
}

// ServeHTTP implements http.Handler.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED")
		return
	}
	rest, ok := strings.CutPrefix(req.URL.Path, "/v2/")
	if !ok {
		refuse(w, http.StatusNotFound, "UNSUPPORTED")
		return
	}
	if rest == "" { // the answer tells that this is a registry
		return
	}
	host := req.URL.Query().Get("ns")
	if name, ref, ok := cutLast(rest, "/manifests/"); ok {
		sep := ":"
		if strings.HasPrefix(ref, "sha256:") {
			sep = "@"
		}
		r.serve(w, req, r.manifests[host+"/"+name+sep+ref], image.MediaTypeManifest, "MANIFEST_UNKNOWN")
		return
	}
	if _, digest, ok := cutLast(rest, "/blobs/"); ok {
		r.serve(w, req, r.blobs[digest], "application/octet-stream", "BLOB_UNKNOWN")
		return
	}
	refuse(w, http.StatusNotFound, "UNSUPPORTED")
}

// serve answers with b, or with the error if there is none.
func (r *Registry) serve(w http.ResponseWriter, req *http.Request, b []byte, mediaType, code string) {
	if b == nil {
		refuse(w, http.StatusNotFound, code)
		return
	}
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Docker-Content-Digest", image.Digest(b))
	http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(b))
}

// refuse answers with an error in the specification's form.
func refuse(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q}]}`, code)
}

// cutLast cuts s around the last sep.
func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}
