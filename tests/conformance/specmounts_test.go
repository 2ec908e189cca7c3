package conformance

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// mounts is an option that adds mounts to the spec.
func mounts(m ...specs.Mount) func(*specs.Spec) {
	return func(s *specs.Spec) { s.Mounts = append(s.Mounts, m...) }
}

func tmpfs(destination string, options ...string) specs.Mount {
	return specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: destination, Options: options}
}

// TestMountProperties is about what mounts are made of, and where they go.
func TestMountProperties(t *testing.T) {
	host := t.TempDir()
	volume := filepath.Join(host, "volume")
	files(map[string]string{
		"volume/sub/path/file": "sub path\n", "volume/sub/secret": "secret\n", "volume/with space/f": "space\n",
		"one": "one\n", "two": "two\n",
	})(host)
	if err := os.Symlink("volume/sub/path", filepath.Join(host, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("one", filepath.Join(host, "filelink")); err != nil {
		t.Fatal(err)
	}
	checkProperties(t, []property{
		{
			name: "tmpfs",
			spec: mounts(tmpfs("/t", "nosuid", "nodev", "noexec", "size=1m", "mode=1770", "uid=1000", "gid=2000")),
			command: "stat -c '%a %u %g' /t; df -k /t | awk 'END {print $2}'; dd if=/dev/zero of=/t/x bs=64k count=32 2>&1 | grep -o 'No space.*'; " +
				"rm /t/x; cp /bin/busybox /t/ 2>/dev/null; awk '$2 == \"/t\" {print $4}' /proc/mounts | tr , '\\n' | grep -E '^no(suid|dev|exec)'",
			stdout: lines("1770 1000 2000", "1024", "No space left on device", "nosuid", "nodev", "noexec"),
		},
		{
			name: "dev shm size",
			spec: func(s *specs.Spec) {
				for i := range s.Mounts {
					if s.Mounts[i].Destination == "/dev/shm" {
						s.Mounts[i].Options = []string{"nosuid", "noexec", "nodev", "mode=1777", "size=8m"}
					}
				}
			},
			command: "df -k /dev/shm | awk 'END {print $2}'; stat -c %a /dev/shm; dd if=/dev/zero of=/dev/shm/x bs=1M count=9 2>&1 | grep -o 'No space.*'",
			stdout:  lines("8192", "1777", "No space left on device"),
		},
		{
			name:    "types",
			command: "for m in /proc /dev /dev/pts /dev/shm /dev/mqueue /sys /run; do awk -v m=$m '$2 == m {print m, $3}' /proc/mounts; done; mkdir /dev/mqueue/x 2>/dev/null || echo no; : > /dev/mqueue/q && ls /dev/mqueue",
			stdout: lines("/proc proc", "/dev tmpfs", "/dev/pts devpts", "/dev/shm tmpfs", "/dev/mqueue mqueue", "/sys sysfs", "/run tmpfs",
				"no", "q"),
		},
		{
			name: "sub path",
			spec: mounts(
				bind(volume+"/sub/path", "/a", "rw"), bind(volume+"/./sub/../sub/path/", "/b", "ro"),
				bind(volume+"/with space", "/c d", "ro"), bind(volume+"/sub/path/file", "/e", "ro"),
			),
			command: "cat /a/file /b/file '/c d/f' /e; ls -a /a | wc -l; find / -name secret -not -path '/proc/*'; echo x > /a/new && cat /b/new; rm /a/new; touch /b/x 2>/dev/null || echo no",
			stdout:  lines("sub path", "sub path", "space", "sub path", "3", "x", "no"),
		},
		{
			name:    "source is a symlink",
			spec:    mounts(bind(filepath.Join(host, "link"), "/a"), bind(filepath.Join(host, "filelink"), "/b")),
			command: "cat /a/file /b",
			stdout:  lines("sub path", "one"),
		},
		{
			name: "destination through symlinks",
			spec: mounts(bind(host+"/volume/sub/path", "/abs/x"), bind(host+"/one", "/rel/y"), tmpfs("/up/z")),
			rootfs: func(dir string) {
				files(map[string]string{"target/keep": ""})(dir)
				os.Symlink("/target", filepath.Join(dir, "abs"))
				os.Symlink("target", filepath.Join(dir, "rel"))
				// Leads out of the root file system, for who follows it on the host.
				os.Symlink("../../../../../../target", filepath.Join(dir, "up"))
			},
			command: "cat /target/x/file /target/y; awk '$2 ~ \"^/target\" {print $2}' /proc/mounts | sort; readlink /abs",
			stdout:  lines("sub path", "one", "/target/x", "/target/y", "/target/z", "/target"),
		},
		{
			name: "order",
			spec: mounts(
				tmpfs("/a", "size=1m"), bind(host+"/volume/sub", "/a/b"), tmpfs("/a/b/path", "size=1m"), bind(host+"/one", "/a/b/path/f"),
				bind(host+"/one", "/two"), bind(host+"/two", "/two"),
			),
			command: "cat /a/b/secret /a/b/path/f /two; ls /a /a/b/path",
			stdout:  lines("secret", "one", "two", "/a:", "b", "", "/a/b/path:", "f"),
		},
		{
			name: "over what is there",
			spec: mounts(bind(host+"/one", "/etc/passwd", "ro"), tmpfs("/folder"), bind(host+"/two", "/etc/link")),
			rootfs: func(dir string) {
				files(map[string]string{"folder/hidden": "", "etc/real": "real\n"})(dir)
				os.Symlink("/etc/real", filepath.Join(dir, "etc/link"))
			},
			command: "cat /etc/passwd /etc/real; ls /folder | wc -l; echo x > /etc/passwd 2>/dev/null || echo no",
			stdout:  lines("one", "two", "0", "no"),
		},
		{
			name:    "noexec and nosuid bind",
			spec:    mounts(bind(host+"/volume", "/v", "noexec", "nosuid", "nodev")),
			command: "cp /bin/busybox /v/; /v/busybox true 2>/dev/null; echo $?; rm /v/busybox",
			stdout:  lines("126"),
		},
		{
			name:    "device node on a volume",
			spec:    mounts(bind(host+"/volume", "/v")),
			command: "cd /v; mknod null c 1 3 && echo x > null && echo yes; mknod kmsg c 1 11 && head -c 1 kmsg 2>&1 | grep -o 'Operation not permitted'; rm null kmsg",
			stdout:  lines("yes", "Operation not permitted"),
		},
		{
			name:    "rootfs propagation shared",
			spec:    func(s *specs.Spec) { s.Linux.RootfsPropagation = "rshared" },
			command: "awk '$5 == \"/\" {print ($7 ~ \"shared:\")}' /proc/self/mountinfo",
			stdout:  lines("1"),
		},
		{
			name:    "rootfs propagation private",
			spec:    func(s *specs.Spec) { s.Linux.RootfsPropagation = "rprivate" },
			command: "awk '$5 == \"/\" {print ($7 ~ \"shared:|master:\")}' /proc/self/mountinfo",
			stdout:  lines("0"),
		},
		{
			name: "cgroup namespace",
			// Of cgroup v2, which is all that the guest has.
			command: "cat /proc/self/cgroup; ls /sys/fs/cgroup/cgroup.procs; grep -c . /sys/fs/cgroup/cgroup.procs | grep -c '^[1-9]'; awk '$2 == \"/sys/fs/cgroup\" {print $3}' /proc/mounts; (echo 1 > /sys/fs/cgroup/pids.max) 2>/dev/null || echo no",
			stdout:  lines("0::/", "/sys/fs/cgroup/cgroup.procs", "1", "cgroup2", "no"),
			vmOnly:  "the machine has cgroup v1",
		},
		{
			name: "no cgroup namespace",
			spec: func(s *specs.Spec) { s.Linux.Namespaces = without(s.Linux.Namespaces, specs.CgroupNamespace) },
			// It has one all the same: the guest has cgroup v2.
			command: "cut -d/ -f1-2 /proc/self/cgroup",
			stdout:  lines("0::/"),
			vmOnly:  "the machine has cgroup v1",
		},
	})
	var st syscall.Stat_t
	if err := syscall.Stat("/target", &st); err == nil {
		t.Error("a mount's destination was made on the host")
	}
}
