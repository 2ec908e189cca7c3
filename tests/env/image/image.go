// Package image makes container images: an Image is built from files of this
// machine, programs compiled here and bytes in memory. Write packs images into
// a docker archive, which `ctr images import` and `nerdctl load` read; OCI
// gives what a registry stores of one.
//
// The same input gives the same bytes: owners are root, times are the epoch,
// and entries keep the order in which they were added. Images are plain data
// and not safe for use by several goroutines at once. Layers are held in
// memory: this is for images of some MiB.
package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
)

// Image is one image with its name.
type Image struct {
	// Name is the full reference: "docker.io/library/busybox:latest".
	Name string
	// Config is what a container of the image runs by default.
	Config Config
	// Layers are stacked, the lowest first.
	Layers []*Layer
}

// Config is the part of an OCI image configuration that runtimes read. The
// names are those of the OCI image specification, config.md.
type Config struct {
	User         string              `json:",omitempty"`
	ExposedPorts map[string]struct{} `json:",omitempty"`
	Env          []string            `json:",omitempty"`
	Entrypoint   []string            `json:",omitempty"`
	Cmd          []string            `json:",omitempty"`
	Volumes      map[string]struct{} `json:",omitempty"`
	WorkingDir   string              `json:",omitempty"`
	Labels       map[string]string   `json:",omitempty"`
	StopSignal   string              `json:",omitempty"`
}

// Layer collects the entries of one layer. The first error sticks and is
// returned by Write.
type Layer struct {
	buf bytes.Buffer
	tw  *tar.Writer
	err error
}

// NewLayer returns an empty layer.
func NewLayer() *Layer {
	l := &Layer{}
	l.tw = tar.NewWriter(&l.buf)
	return l
}

// Dir adds directories, each with the given permissions.
func (l *Layer) Dir(mode int64, names ...string) *Layer {
	for _, n := range names {
		l.add(&tar.Header{Typeflag: tar.TypeDir, Name: n + "/", Mode: mode}, nil)
	}
	return l
}

// File adds a regular file. mode may hold the set-user-id bits of chmod(2).
func (l *Layer) File(name string, mode int64, data []byte) *Layer {
	return l.add(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(data))}, data)
}

// HostFile adds a copy of a regular file of this machine.
func (l *Layer) HostFile(name string, mode int64, source string) *Layer {
	b, err := os.ReadFile(source)
	if err != nil && l.err == nil {
		l.err = err
	}
	return l.File(name, mode, b)
}

// Owned adds a regular file that belongs to somebody else than root.
func (l *Layer) Owned(name string, mode int64, uid, gid int, data []byte) *Layer {
	return l.add(&tar.Header{
		Typeflag: tar.TypeReg, Name: name, Mode: mode, Uid: uid, Gid: gid, Size: int64(len(data)),
	}, data)
}

// Symlink adds a symbolic link.
func (l *Layer) Symlink(name, target string) *Layer {
	return l.add(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, nil)
}

// Hardlink adds another name for a file that was added before. containerd
// gives the file the permissions of its last name, so they must be the same.
func (l *Layer) Hardlink(name string, mode int64, target string) *Layer {
	return l.add(&tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: mode}, nil)
}

// Tree adds the directories, regular files and symbolic links below a
// directory of this machine, with their permissions.
func (l *Layer) Tree(dir string) *Layer {
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil || rel == "." {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch mode := info.Mode(); {
		case mode.IsDir():
			l.Dir(int64(mode.Perm()), rel)
		case mode.IsRegular():
			l.HostFile(rel, int64(mode.Perm()), p)
		case mode&fs.ModeSymlink != 0:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			l.Symlink(rel, target)
		default:
			return fmt.Errorf("%s: a %v cannot be put into an image", p, mode.Type())
		}
		return nil
	})
	if err != nil && l.err == nil {
		l.err = err
	}
	return l
}

func (l *Layer) add(h *tar.Header, data []byte) *Layer {
	if l.err != nil {
		return l
	}
	if l.err = l.tw.WriteHeader(h); l.err == nil {
		_, l.err = l.tw.Write(data)
	}
	return l
}

// bytes returns the layer as an uncompressed tar file. It may be called again.
func (l *Layer) bytes() ([]byte, error) {
	if l.err == nil {
		l.err = l.tw.Flush()
	}
	if l.err != nil {
		return nil, l.err
	}
	// Two empty blocks end a tar file; Close would forbid a second call.
	return append(bytes.Clone(l.buf.Bytes()), make([]byte, 1024)...), nil
}

// manifest is one entry of a docker archive's manifest.json.
type manifest struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// Write packs the images into one docker archive. Equal layers are stored
// once.
func Write(w io.Writer, images ...Image) error {
	tw := tar.NewWriter(w)
	written := map[string]bool{}
	put := func(name string, b []byte) error {
		if written[name] {
			return nil
		}
		written[name] = true
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(b))}); err != nil {
			return err
		}
		_, err := tw.Write(b)
		return err
	}
	var manifests []manifest
	for _, img := range images {
		m, err := img.write(put)
		if err != nil {
			return fmt.Errorf("write image %s: %w", img.Name, err)
		}
		manifests = append(manifests, m)
	}
	b, err := json.Marshal(manifests)
	if err != nil {
		return fmt.Errorf("write image manifest: %w", err)
	}
	if err := put("manifest.json", b); err != nil {
		return fmt.Errorf("write image manifest: %w", err)
	}
	return tw.Close()
}

func (img Image) write(put func(name string, b []byte) error) (manifest, error) {
	config, layers, err := img.content()
	if err != nil {
		return manifest{}, err
	}
	m := manifest{RepoTags: []string{img.Name}, Config: digest(config) + ".json"}
	for _, b := range layers {
		name := path.Join(digest(b), "layer.tar")
		if err := put(name, b); err != nil {
			return manifest{}, err
		}
		m.Layers = append(m.Layers, name)
	}
	return m, put(m.Config, config)
}

// content returns the configuration and the layers as they are stored.
func (img Image) content() (config []byte, layers [][]byte, err error) {
	type rootFS struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	}
	c := struct {
		Architecture string `json:"architecture"`
		OS           string `json:"os"`
		Created      string `json:"created"`
		Config       Config `json:"config"`
		RootFS       rootFS `json:"rootfs"`
	}{runtime.GOARCH, "linux", "1970-01-01T00:00:00Z", img.Config, rootFS{Type: "layers"}}
	for _, l := range img.Layers {
		b, err := l.bytes()
		if err != nil {
			return nil, nil, err
		}
		layers = append(layers, b)
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, Digest(b))
	}
	config, err = json.Marshal(c)
	return config, layers, err
}

// Digest names content as registries do: "sha256:…".
func Digest(b []byte) string { return "sha256:" + digest(b) }

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
