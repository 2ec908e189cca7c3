package image

import (
	"encoding/json"
	"fmt"
)

// Media types of the OCI image specification.
const (
	MediaTypeManifest = "application/vnd.oci.image.manifest.v1+json"
	mediaTypeConfig   = "application/vnd.oci.image.config.v1+json"
	mediaTypeLayer    = "application/vnd.oci.image.layer.v1.tar"
)

// descriptor is the specification's descriptor.md.
type descriptor struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Size      int    `json:"size"`
}

// Stored is an image as a registry stores it.
type Stored struct {
	// Manifest is of type MediaTypeManifest.
	Manifest []byte
	// Digest is the manifest's: "sha256:…".
	Digest string
	// Blobs are the configuration and the layers by their digests.
	Blobs map[string][]byte
}

// OCI returns the image as an OCI image manifest with its blobs.
func (img Image) OCI() (Stored, error) {
	config, layers, err := img.content()
	if err != nil {
		return Stored{}, fmt.Errorf("make image %s: %w", img.Name, err)
	}
	s := Stored{Blobs: map[string][]byte{}}
	add := func(mediaType string, b []byte) descriptor {
		d := descriptor{MediaType: mediaType, Digest: Digest(b), Size: len(b)}
		s.Blobs[d.Digest] = b
		return d
	}
	m := struct {
		SchemaVersion int          `json:"schemaVersion"`
		MediaType     string       `json:"mediaType"`
		Config        descriptor   `json:"config"`
		Layers        []descriptor `json:"layers"`
	}{SchemaVersion: 2, MediaType: MediaTypeManifest, Config: add(mediaTypeConfig, config)}
	for _, b := range layers {
		m.Layers = append(m.Layers, add(mediaTypeLayer, b))
	}
	if s.Manifest, err = json.Marshal(m); err != nil {
		return Stored{}, fmt.Errorf("make image %s: %w", img.Name, err)
	}
	s.Digest = Digest(s.Manifest)
	return s, nil
}
