// Package criimage makes stand-ins for the images that critest (cri-tools
// v1.36.0) pulls, under their names. They come from this machine's files and
// from programs compiled here, and hold what the tests look at:
//
//   - a shell whose ls is a program of its own, because a test masks /bin/ls;
//     hence Debian's busybox that is not static (hack/busybox.sh);
//   - ipcs (util-linux) and pgrep, which that busybox lacks;
//   - users and groups of certain numbers;
//   - web servers, one of which passes for nginx;
//   - a program with the set-user-id bit that prints its effective user.
package criimage

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vmrt/vmrt/hack/tools"
	"github.com/vmrt/vmrt/tests/env/image"
)

const (
	e2e     = "registry.k8s.io/e2e-test-images/"
	staging = "gcr.io/k8s-staging-cri-tools/"

	// BusyboxName is the image of most of critest's containers.
	BusyboxName = e2e + "busybox:1.29-2"
	// NginxName is a web server at port 80, started by the program nginx.
	NginxName = e2e + "nginx:1.14-2"

	// digestName is the image that is pulled by its digest.
	digestName = staging + "test-image-digest:latest"
)

// User databases: critest knows users 1000, www-data and nobody, and that 1000
// is a member of 50000.
const (
	passwd = "root:x:0:0:root:/root:/bin/sh\n" +
		"default-user:x:1000:1000::/home:/bin/sh\n" +
		"www-data:x:1002:1002::/www:/bin/sh\n" +
		"nobody:x:65534:65534:nobody:/:/bin/false\n"
	group = "root:x:0:\ndefault-user:x:1000:\nwww-data:x:1002:\n" +
		"group-defined-in-image:x:50000:default-user\nnogroup:x:65534:\n"
)

// pgrep finds processes by their whole name, which is how critest calls it.
const pgrep = "#!/bin/sh\nexec pidof \"$@\"\n"

var path = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}

// All returns every image that critest needs, except the one of the pause
// container, which each environment for pods has.
func All(ctx context.Context) ([]image.Image, error) {
	base, err := userLand(ctx)
	if err != nil {
		return nil, fmt.Errorf("make critest's images: %w", err)
	}
	images := shells(base)
	for _, add := range []func(context.Context, *image.Layer) ([]image.Image, error){webServers, programs} {
		more, err := add(ctx, base)
		if err != nil {
			return nil, fmt.Errorf("make critest's images: %w", err)
		}
		images = append(images, more...)
	}
	return append(images, digestImage()), nil
}

// userLand is the lowest layer of most images.
func userLand(ctx context.Context) (*image.Layer, error) {
	root, err := tools.Root()
	if err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, filepath.Join(root, "hack", "busybox.sh")).Output()
	if err != nil {
		return nil, fmt.Errorf("get busybox: %w", err)
	}
	ipcs, err := exec.LookPath("ipcs")
	if err != nil {
		return nil, err
	}
	l, err := image.UserLand(strings.TrimSpace(string(out)), passwd, group)
	if err != nil {
		return nil, err
	}
	return l.HostFile("usr/bin/ipcs", 0o755, ipcs).File("usr/bin/pgrep", 0o755, []byte(pgrep)), nil
}

// shells are images that differ by their users and names.
func shells(base *image.Layer) []image.Image {
	shell := func(name, user string, labels map[string]string) image.Image {
		return image.Image{
			Name:   name,
			Config: image.Config{User: user, Env: path, Cmd: []string{"sh"}, Labels: labels},
			Layers: []*image.Layer{base},
		}
	}
	images := []image.Image{shell(BusyboxName, "", nil)}
	for name, user := range map[string]string{
		"test-image-user-uid":            "1002",
		"test-image-user-username":       "www-data",
		"test-image-user-uid-group":      "1003:1003",
		"test-image-user-username-group": "www-data:www-data",
		"test-image-predefined-group":    "1000",
	} {
		images = append(images, shell(staging+name+":latest", user, nil))
	}
	// Each of these is another image, while all tags of test-image-tags are
	// the same one.
	for _, name := range []string{
		"test-image-latest:latest", "test-image-tag:test", "test-image-tag:all",
		"test-image-1:latest", "test-image-2:latest", "test-image-3:latest",
	} {
		img := shell(staging+name, "", map[string]string{"name": name})
		// critest runs some of them as they are, and removes the container at
		// once. containerd refuses that if it ends by itself meanwhile.
		img.Config.Cmd = []string{"sleep", "infinity"}
		images = append(images, img)
	}
	for _, tag := range []string{"1", "2", "3"} {
		images = append(images, shell(staging+"test-image-tags:"+tag, "", map[string]string{"name": "test-image-tags"}))
	}
	return images
}

// webServers are images whose servers answer at port 80, or at 12003 for the
// one that runs in the host's network.
func webServers(ctx context.Context, base *image.Layer) ([]image.Image, error) {
	web, err := image.Program(ctx, "web")
	if err != nil {
		return nil, err
	}
	server := func(name, program string, args ...string) image.Image {
		return image.Image{
			Name: name,
			Config: image.Config{
				Env: path, Cmd: append([]string{program}, args...), ExposedPorts: map[string]struct{}{"80/tcp": {}},
			},
			Layers: []*image.Layer{base, image.NewLayer().File("usr/sbin/"+program, 0o755, web)},
		}
	}
	return []image.Image{
		server(NginxName, "nginx"),
		server(e2e+"httpd:2.4.39-4", "httpd"),
		server(staging+"hostnet-nginx-"+runtime.GOARCH+":latest", "nginx", "-listen", ":12003"),
	}, nil
}

// programs are images with one program alone.
func programs(ctx context.Context, _ *image.Layer) ([]image.Image, error) {
	euid, err := image.Program(ctx, "euid")
	if err != nil {
		return nil, err
	}
	pause, err := image.Pause(ctx)
	if err != nil {
		return nil, err
	}
	// Not the same image as the environment's, which critest must not remove.
	pause.Config.Labels = map[string]string{"version": "3.9"}
	images := []image.Image{{
		Name:   e2e + "nonewprivs:1.3",
		Config: image.Config{Entrypoint: []string{"/euid"}},
		Layers: []*image.Layer{image.NewLayer().File("euid", 0o4755, euid)},
	}}
	for _, registry := range []string{"registry.k8s.io", "k8s.gcr.io"} {
		pause.Name = registry + "/pause:3.9"
		images = append(images, pause)
	}
	return images, nil
}

// digestImage is never run. It depends on nothing that lies outside of this
// source, so that its digest is known when critest is built
// (tools.TestImageDigest).
func digestImage() image.Image {
	return image.Image{
		Name:   digestName,
		Layers: []*image.Layer{image.NewLayer().File("name", 0o644, []byte("test-image-digest\n"))},
	}
}
