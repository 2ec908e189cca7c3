package registry_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/vmrt/vmrt/tests/env/image"
	"github.com/vmrt/vmrt/tests/env/registry"
)

func TestServe(t *testing.T) {
	img := image.Image{
		Name:   "registry.example/a/b:1",
		Layers: []*image.Layer{image.NewLayer().File("f", 0o644, []byte("text"))},
	}
	want, err := img.OCI()
	if err != nil {
		t.Fatal(err)
	}
	other := image.Image{Name: "other.example/a/b:1"}
	reg, err := registry.New(img, other)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(reg)
	defer srv.Close()

	type answer struct {
		code   int
		body   string
		digest string
	}
	manifest := answer{200, string(want.Manifest), want.Digest}
	tests := map[string]struct {
		method, url, byteRange string
		want                   answer
	}{
		"root":                {"GET", "/v2/", "", answer{code: 200}},
		"tag":                 {"GET", "/v2/a/b/manifests/1?ns=registry.example", "", manifest},
		"digest":              {"GET", "/v2/a/b/manifests/" + want.Digest + "?ns=registry.example", "", manifest},
		"head":                {"HEAD", "/v2/a/b/manifests/1?ns=registry.example", "", answer{200, "", want.Digest}},
		"other registry":      {"GET", "/v2/a/b/manifests/" + want.Digest + "?ns=other.example", "", answer{404, `{"errors":[{"code":"MANIFEST_UNKNOWN"}]}`, ""}},
		"absent tag":          {"GET", "/v2/a/b/manifests/2?ns=registry.example", "", answer{404, `{"errors":[{"code":"MANIFEST_UNKNOWN"}]}`, ""}},
		"absent blob":         {"GET", "/v2/a/b/blobs/" + want.Digest + "?ns=registry.example", "", answer{404, `{"errors":[{"code":"BLOB_UNKNOWN"}]}`, ""}},
		"push":                {"PUT", "/v2/a/b/manifests/1?ns=registry.example", "", answer{405, `{"errors":[{"code":"UNSUPPORTED"}]}`, ""}},
		"not of the protocol": {"GET", "/v1/", "", answer{404, `{"errors":[{"code":"UNSUPPORTED"}]}`, ""}},
	}
	for digest, b := range want.Blobs {
		tests["blob "+digest] = struct {
			method, url, byteRange string
			want                   answer
		}{"GET", "/v2/a/b/blobs/" + digest, "", answer{200, string(b), digest}}
		tests["part of blob "+digest] = struct {
			method, url, byteRange string
			want                   answer
		}{"GET", "/v2/a/b/blobs/" + digest, "bytes=5-9", answer{206, string(b[5:10]), digest}}
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			req, err := http.NewRequest(tt.method, srv.URL+tt.url, nil)
			if err != nil {
				t.Fatal(err)
			}
			if tt.byteRange != "" {
				req.Header.Set("Range", tt.byteRange)
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			got := answer{resp.StatusCode, string(body), resp.Header.Get("Docker-Content-Digest")}
			if got != tt.want {
				t.Errorf("%s %s = %+v; want %+v", tt.method, tt.url, got, tt.want)
			}
		})
	}
}

func TestNew(t *testing.T) {
	for _, name := range []string{"registry.example/a", "registry.example:5000/a", "a"} {
		if _, err := registry.New(image.Image{Name: name}); err == nil {
			t.Errorf("New(%q) = nil error; want one, because it has no tag", name)
		}
	}
}
