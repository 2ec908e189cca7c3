package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// unpack returns the regular files of a tar archive.
func unpack(t *testing.T, r io.Reader) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[h.Name], err = io.ReadAll(tr); err != nil {
			t.Fatal(err)
		}
	}
}

func TestWrite(t *testing.T) {
	base := NewLayer().Dir(0o755, "bin").File("bin/a", 0o4755, []byte("program")).Hardlink("bin/b", 0o4755, "bin/a")
	images := []Image{
		{Name: "docker.io/x/one:1", Config: Config{Cmd: []string{"a"}}, Layers: []*Layer{base}},
		{Name: "docker.io/x/two:2", Layers: []*Layer{base, NewLayer().Symlink("c", "bin/a")}},
	}
	var first, second bytes.Buffer
	for _, w := range []io.Writer{&first, &second} {
		if err := Write(w, images...); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("two archives of the same images differ")
	}

	files := unpack(t, &first)
	var manifests []manifest
	if err := json.Unmarshal(files["manifest.json"], &manifests); err != nil {
		t.Fatal(err)
	}
	if len(manifests) != 2 || len(manifests[0].Layers) != 1 || len(manifests[1].Layers) != 2 ||
		manifests[0].Layers[0] != manifests[1].Layers[0] {
		t.Fatalf("manifests = %+v; want images of 1 and 2 layers with the same first one", manifests)
	}
	for _, m := range manifests {
		var config struct {
			RootFS struct {
				DiffIDs []string `json:"diff_ids"`
			} `json:"rootfs"`
		}
		if err := json.Unmarshal(files[m.Config], &config); err != nil {
			t.Fatal(err)
		}
		for i, l := range m.Layers {
			if want := "sha256:" + digest(files[l]); config.RootFS.DiffIDs[i] != want {
				t.Errorf("%v: diff id %d = %s; want %s", m.RepoTags, i, config.RootFS.DiffIDs[i], want)
			}
		}
	}
	layer := tar.NewReader(bytes.NewReader(files[manifests[0].Layers[0]]))
	var names []string
	for h, err := layer.Next(); err == nil; h, err = layer.Next() {
		names = append(names, h.Name)
		if h.Uid != 0 || h.Gid != 0 || h.ModTime.Unix() != 0 {
			t.Errorf("%s: owner %d:%d, time %v; want root and the epoch", h.Name, h.Uid, h.Gid, h.ModTime)
		}
	}
	if diff := cmp.Diff([]string{"bin/", "bin/a", "bin/b"}, names); diff != "" {
		t.Errorf("entries (-want +got):\n%s", diff)
	}
}

func TestTree(t *testing.T) {
	dir := t.TempDir()
	for _, err := range []error{
		os.MkdirAll(filepath.Join(dir, "a", "b"), 0o755),
		os.WriteFile(filepath.Join(dir, "a", "f"), []byte("text"), 0o600),
		os.Symlink("f", filepath.Join(dir, "a", "l")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	b, err := NewLayer().Tree(dir).bytes()
	if err != nil {
		t.Fatal(err)
	}
	type entry struct {
		Name, Link string
		Mode       int64
	}
	var got []entry
	for tr := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, entry{h.Name, h.Linkname, h.Mode})
	}
	want := []entry{{"a/", "", 0o755}, {"a/b/", "", 0o755}, {"a/f", "", 0o600}, {"a/l", "f", 0o777}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Tree (-want +got):\n%s", diff)
	}
}

func TestErrorsStick(t *testing.T) {
	l := NewLayer().HostFile("a", 0o644, filepath.Join(t.TempDir(), "absent")).File("b", 0o644, nil)
	err := Write(io.Discard, Image{Name: "docker.io/x/broken:1", Layers: []*Layer{l}})
	if err == nil || !strings.Contains(err.Error(), "write image docker.io/x/broken:1: ") || !strings.Contains(err.Error(), "absent") {
		t.Errorf("Write = %v; want an error that names the image and the missing file", err)
	}
}
