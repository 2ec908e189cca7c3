package containerd

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/tests/env"
)

// TestApart is about what one container asks of another or of the host, and
// cannot have from inside a virtual machine: an error that says so, nothing
// left over, and the other container as it was. What means "the host's" without
// naming a namespace is the virtual machine's own.
func TestApart(t *testing.T) {
	e := start(t, "2.4", "nerdctl", "cni")
	ctx := env.Context(t)
	with := []string{"run", "--rm", "--runtime", runtimeName}
	if out, err := e.Nerdctl(ctx, "run", "-d", "--runtime", runtimeName, "--net", "none", "--ipc", "shareable", "--name", "box", busybox,
		"sh", "-c", "echo shared > /dev/shm/f; exec sleep 1000").Run(); err != nil {
		t.Fatal(out, err)
	}
	defer func() {
		if _, err := e.Nerdctl(ctx, "rm", "-f", "box").Run(); err != nil {
			t.Error(err)
		}
	}()
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	if err := unix.Mknod(disk, unix.S_IFBLK|0o600, int(unix.Mkdev(7, 250))); err != nil {
		t.Fatal(err)
	}
	const ctrPrefix = "ctr "
	for _, tt := range []struct{ name, flags, want string }{
		{"network of a container", "--net container:box", "two virtual machines cannot share one"},
		{"processes of a container", "--net none --pid container:box", "a namespace outside the virtual machine cannot be joined"},
		{"memory of a container", "--net none --ipc container:box", "two virtual machines cannot share memory"},
		{"device of the host", "--net none --device " + disk + ":/dev/disk", "not present in the virtual machine"},
		{"pid namespace of a process of the host", ctrPrefix + "--with-ns pid:/proc/1/ns/pid", "a namespace outside the virtual machine cannot be joined"},
		{"mounts for the host", ctrPrefix + "--mount type=bind,src=" + dir + ",dst=/mnt,options=rbind:rshared", "cannot propagate to the host"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			flags, ofCtr := strings.CutPrefix(tt.flags, ctrPrefix)
			args := append(append([]string{}, with...), strings.Fields(flags)...)
			cmd := e.Nerdctl(ctx, append(args, busybox, "true")...)
			if ofCtr {
				cmd = e.Ctr(ctx, append(args, busybox, "other", "true")...)
			}
			_, err := cmd.Run()
			if env.ExitCode(err) <= 0 || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("run = %v; want it to fail with %q", err, tt.want)
			}
			if out, err := e.Nerdctl(ctx, "exec", "box", "cat", "/dev/shm/f").Run(); out != "shared\n" {
				t.Errorf("the other container then says %q, %v; want it alive", out, err)
			}
			if out, err := e.Ctr(ctx, "task", "ls", "-q").Run(); err != nil || len(strings.Fields(out)) != 1 {
				t.Errorf("tasks = %q, %v; want the other container's", out, err)
			}
			// nerdctl keeps a container whose creation failed, with any runtime.
			if out, err := e.Nerdctl(ctx, "container", "prune", "-f").Run(); err != nil {
				t.Error(out, err)
			}
		})
	}
	t.Run("virtual machine's own", func(t *testing.T) {
		args := append(with, "--net", "none", "--pid", "host", "--ipc", "host", "--cgroupns", "host", busybox,
			"sh", "-c", "ls /dev/shm; cat /proc/sys/kernel/random/boot_id")
		out, err := e.Nerdctl(ctx, args...).Run()
		if err != nil {
			t.Fatal(err)
		}
		boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			t.Fatal(err)
		}
		if len(strings.Fields(out)) != 1 || out == string(boot) {
			t.Errorf("container sees %q; want no shared memory, and another boot id than the host's", out)
		}
	})
}
