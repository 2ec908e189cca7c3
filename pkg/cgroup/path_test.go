package cgroup

import (
	"testing"

	"github.com/containerd/errdefs"
)

func TestResolve(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"/default/web", "/default/web"},
		{"default/web", "/default/web"},
		{"/a/../../b//c/", "/b/c"},
		{"", "/vmrt/id"},
		{"system.slice:nerdctl:web", "/system.slice/nerdctl-web.scope"},
		{":nerdctl:web", "/system.slice/nerdctl-web.scope"},
		{"system.slice::web", "/system.slice/web.scope"},
		{"-.slice:p:web", "/p-web.scope"},
		{"kubepods-burstable-pod12_34.slice:cri-containerd:abc",
			"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod12_34.slice/cri-containerd-abc.scope"},
		{"user.slice:p:own.slice", "/user.slice/own.slice"},
		{"/a:b:c", "/a:b:c"},
		{"a:b", "/a:b"},
	} {
		if got, err := resolve(tt.in, "id"); got != tt.want || err != nil {
			t.Errorf("resolve(%q) = %q, %v; want %q", tt.in, got, err, tt.want)
		}
	}
	for _, tt := range []struct{ in, id, want string }{
		{"/", "id", `cgroup path "/": the root cgroup cannot be a pod's`},
		{"../..", "id", `cgroup path "/": the root cgroup cannot be a pod's`},
		{"/a\x00", "id", `cgroup path "/a\x00": not a clean absolute path`},
		{"", "", `cgroup path "": no id to name it by`},
		{"a:b:c", "id", `cgroup path "a:b:c": invalid slice name: a`},
		{"a--b.slice:b:c", "id", `cgroup path "a--b.slice:b:c": invalid slice name: a--b.slice`},
		{".slice:b:c", "id", `cgroup path ".slice:b:c": invalid slice name: .slice`},
		{"a.slice:b:", "id", `cgroup path "a.slice:b:": no name of a unit`},
	} {
		if got, err := resolve(tt.in, tt.id); !errdefs.IsInvalidArgument(err) || err.Error() != tt.want {
			t.Errorf("resolve(%q) = %q, %v; want %s", tt.in, got, err, tt.want)
		}
	}
}

func TestLoadPaths(t *testing.T) {
	for _, p := range []string{"", "/", "a", "/a/..", "/a/", "//a"} {
		if _, err := load(nil, p); !errdefs.IsInvalidArgument(err) {
			t.Errorf("load(%q) error = %v; want invalid argument", p, err)
		}
	}
}

func FuzzResolve(f *testing.F) {
	f.Add("kubepods-burstable.slice:cri:abc")
	f.Add("/a/b")
	f.Fuzz(func(t *testing.T, s string) {
		if p, err := resolve(s, "id"); err == nil && check(p) != nil {
			t.Errorf("resolve(%q) = %q, which is no path for a pod", s, p)
		}
	})
}
