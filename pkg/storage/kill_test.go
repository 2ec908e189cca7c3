//go:build linux

package storage

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/anchor"
	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/podns/podnstest"
)

// helperPod holds a pod with all that a container has on the host, and prints
// the pids of its processes.
func helperPod() {
	pids, err := fillPod(os.Getenv("DIR"), strings.Split(os.Getenv("OPTIONS"), " "), os.Getenv("VOLUME"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(pids...)
	select {}
}

func fillPod(dir string, overlay []string, volume string) (pids []any, err error) {
	ctx := context.Background()
	ns, err := podns.Open(podns.Config{})
	if err != nil {
		return nil, err
	}
	s, err := NewShare(ns, dir)
	if err != nil {
		return nil, err
	}
	d, err := StartDaemon(ctx, ns, DaemonConfig{Share: s})
	if err != nil {
		return nil, err
	}
	if _, err := features(d); err != nil {
		return nil, err
	}
	rootfs, err := s.AddRootfs("web", []mount.Mount{{Type: "overlay", Options: overlay}})
	if err != nil {
		return nil, err
	}
	bind, err := s.AddBind("web", volume, BindOptions{Recursive: true})
	if err != nil {
		return nil, err
	}
	a, err := anchor.Start(ns, anchor.Config{Root: rootfs.Host, Binds: []anchor.Bind{{Source: bind.Host, Target: "/volume"}}})
	if err != nil {
		return nil, err
	}
	// The daemon's other process is not this one's child.
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", d.Pid(), d.Pid()))
	if err != nil {
		return nil, err
	}
	return []any{a.Pid(), d.Pid(), strings.TrimSpace(string(b))}, nil
}

// Killing the process that holds a pod leaves nothing on the host: no process,
// no mount, no file, and everything that was mounted can be unmounted.
func TestKill9(t *testing.T) {
	podnstest.Root(t)
	if _, err := FindDaemon(); err != nil {
		t.Skip(err)
	}
	dir, volume, layers := t.TempDir(), t.TempDir(), t.TempDir()
	for _, d := range []string{volume, layers} {
		if err := unix.Mount("host", d, "tmpfs", 0, "size=1m"); err != nil {
			t.Fatal(err)
		}
	}
	m := snapshot(t, layers, 2)
	if err := os.Mkdir(filepath.Join(layers, "0/fs/volume"), 0o755); err != nil {
		t.Fatal(err)
	}
	watch, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(watch)
	for _, d := range []string{volume, layers} {
		if _, err := unix.InotifyAddWatch(watch, d, unix.IN_UNMOUNT); err != nil {
			t.Fatal(err)
		}
	}

	cmd := podnstest.Helper("pod")
	cmd.Env = append(cmd.Env, "DIR="+dir, "VOLUME="+volume, "OPTIONS="+strings.Join(m.Options, " "))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("helper: %v", err)
	}
	var pidfds []int
	for _, pid := range strings.Fields(line) {
		var n int
		fmt.Sscan(pid, &n)
		fd, err := unix.PidfdOpen(n, 0)
		if err != nil {
			t.Fatalf("process %q of %q: %v", pid, line, err)
		}
		defer unix.Close(fd)
		pidfds = append(pidfds, fd)
	}
	if len(pidfds) != 3 {
		t.Fatalf("helper has processes %q; want an anchor and two of virtiofsd", line)
	}
	// From here on only the pod keeps the two file systems mounted.
	for _, d := range []string{volume, layers} {
		if err := unix.Unmount(d, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
	}
	if n, _ := unix.Read(watch, make([]byte, 4096)); n > 0 {
		t.Fatal("the pod does not have the file systems mounted")
	}

	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for i, fd := range pidfds {
		if !podnstest.Readable(t, fd) {
			t.Errorf("process %d of %q has not ended", i, line)
		}
	}
	unmounted := 0
	podnstest.Wait(t, "both file systems to be unmounted", func() bool {
		buf := make([]byte, 4096)
		n, _ := unix.Read(watch, buf)
		// Two events of fixed size for each: IN_UNMOUNT, IN_IGNORED.
		unmounted += max(n, 0) / unix.SizeofInotifyEvent
		return unmounted >= 4
	})
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left in the share's folder: %v, %v", left, err)
	}
}
