package image

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
)

// BusyboxName is the name under which tests and the demonstration import the
// image of Busybox.
const BusyboxName = "docker.io/library/busybox:latest"

// Passwd and Group are the user databases of the images made here.
const (
	Passwd = "root:x:0:0:root:/root:/bin/sh\n" +
		"daemon:x:1:1:daemon:/:/bin/false\n" +
		"www-data:x:1002:1002::/www:/bin/sh\n" +
		"nobody:x:65534:65534:nobody:/:/bin/false\n"
	Group = "root:x:0:\ndaemon:x:1:\nwww-data:x:1002:\nextra:x:50000:www-data\nnogroup:x:65534:\n"
)

// Busybox returns a small image with a shell, made of this machine's static
// busybox (Debian: busybox-static), every applet a hard link.
func Busybox() (Image, error) {
	l, err := BusyboxLayer()
	if err != nil {
		return Image{}, err
	}
	return Image{
		Name: BusyboxName,
		Config: Config{
			Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
			Cmd: []string{"sh"},
		},
		Layers: []*Layer{l},
	}, nil
}

// BusyboxLayer returns the layer of Busybox, for images built on top.
func BusyboxLayer() (*Layer, error) {
	bin, err := exec.LookPath("busybox")
	if err != nil {
		return nil, fmt.Errorf("make busybox image: %w", err)
	}
	if err := checkStatic(bin); err != nil {
		return nil, fmt.Errorf("make busybox image: %w", err)
	}
	return UserLand(bin, Passwd, Group)
}

// UserLand returns a layer with the usual folders, the user databases, and the
// busybox program bin with the libraries that it needs, every applet a hard
// link to it.
func UserLand(bin, passwd, group string) (*Layer, error) {
	out, err := exec.Command(bin, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("make busybox image: list applets of %s: %w", bin, err)
	}
	l := NewLayer()
	l.Dir(0o755, "bin", "dev", "etc", "home", "mnt", "proc", "sys", "usr", "usr/bin", "usr/sbin", "sbin", "var", "www")
	l.Dir(0o700, "root").Dir(0o1777, "tmp", "var/tmp").Symlink("var/run", "/run").Dir(0o755, "run")
	l.File("etc/passwd", 0o644, []byte(passwd)).File("etc/group", 0o644, []byte(group))
	l.HostFile("bin/busybox", 0o755, bin).Libraries(bin)
	for _, applet := range strings.Fields(string(out)) {
		if applet != "busybox" {
			l.Hardlink("bin/"+applet, 0o755, "bin/busybox")
		}
	}
	return l, nil
}

// checkStatic returns an error when the program needs a dynamic linker.
func checkStatic(bin string) error {
	libs, err := libraries(bin)
	if err != nil {
		return err
	}
	if len(libs) > 0 {
		return errors.New(bin + " is dynamically linked: want Debian's busybox-static")
	}
	return nil
}
