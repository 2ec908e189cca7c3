package conformance

import (
	"os"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// TestContainerProperties is about what a container's processes see of
// themselves and of their machine.
func TestContainerProperties(t *testing.T) {
	checkProperties(t, []property{
		{
			name: "user and groups",
			spec: func(s *specs.Spec) {
				s.Process.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{7, 2000}, Umask: ptr(uint32(0o27))}
			},
			command: "id -u; id -g; id -G; umask; grep -E '^(Uid|Gid):' /proc/self/status",
			stdout:  lines("1000", "1001", "1001 7 2000", "0027", "Uid:\t1000\t1000\t1000\t1000", "Gid:\t1001\t1001\t1001\t1001"),
		},
		{
			name: "environment",
			spec: func(s *specs.Spec) {
				s.Process.Args = []string{"env"}
				s.Process.Env = []string{"PATH=/bin", "E=", "U=\u00fc=\n", "A=b c", "A=last"}
			},
			stdout: lines("PATH=/bin", "E=", "U=\u00fc=", "", "A=last", "HOME=/root"),
		},
		{
			name:    "missing cwd is made",
			spec:    func(s *specs.Spec) { s.Process.Cwd = "/new/folder" },
			command: "pwd; stat -c '%a %u' .",
			stdout:  lines("/new/folder", "755 0"),
		},
		{
			name:    "host and domain name",
			spec:    func(s *specs.Spec) { s.Hostname = "box.example"; s.Domainname = "nis.example" },
			command: "hostname; cat /proc/sys/kernel/domainname",
			stdout:  lines("box.example", "nis.example"),
		},
		{
			name: "sysctls",
			spec: func(s *specs.Spec) {
				s.Linux.Sysctl = map[string]string{
					"kernel.shmmax": "12345", "net.ipv4.ip_unprivileged_port_start": "80", "net.ipv4.ping_group_range": "0 5", "fs.mqueue.msg_max": "20",
				}
			},
			command: "cd /proc/sys; cat kernel/shmmax net/ipv4/ip_unprivileged_port_start net/ipv4/ping_group_range fs/mqueue/msg_max",
			stdout:  lines("12345", "80", "0\t5", "20"),
		},
		{
			name:    "oom score",
			spec:    func(s *specs.Spec) { s.Process.OOMScoreAdj = ptr(321) },
			command: "cat /proc/self/oom_score_adj",
			stdout:  lines("321"),
		},
		{
			name:    "oom score below zero",
			spec:    func(s *specs.Spec) { s.Process.OOMScoreAdj = ptr(-998) },
			command: "cat /proc/self/oom_score_adj",
			stdout:  lines("-998"),
			vmOnly:  "the machine lacks CAP_SYS_RESOURCE",
		},
		{
			name:    "pid namespace",
			command: "echo $$; ls /proc | grep -c '^[0-9]' | grep -c '^[1-9]$'; readlink /proc/1/exe",
			stdout:  lines("1", "1", "/bin/busybox"),
		},
		{
			name:    "default devices",
			command: "cd /dev; ls -d null zero full random urandom tty ptmx fd stdin stdout stderr; head -c 3 zero | wc -c; echo x > null; (echo x > full) 2>&1 | grep -o 'No space.*'; head -c 8 urandom | wc -c",
			stdout: lines("fd", "full", "null", "ptmx", "random", "stderr", "stdin", "stdout", "tty", "urandom", "zero",
				"3", "No space left on device", "8"),
		},
		{
			name: "device that is named",
			spec: func(s *specs.Spec) {
				mode := ptr(os.FileMode(0o640))
				s.Linux.Devices = []specs.LinuxDevice{
					{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229, FileMode: mode, UID: ptr(uint32(1000)), GID: ptr(uint32(5))},
					{Path: "/dev/net/tun", Type: "c", Major: 10, Minor: 200, FileMode: mode},
					{Path: "/dev/my-null", Type: "c", Major: 1, Minor: 3, FileMode: mode},
				}
				for _, d := range s.Linux.Devices {
					s.Linux.Resources.Devices = append(s.Linux.Resources.Devices,
						specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: ptr(d.Major), Minor: ptr(d.Minor), Access: "rwm"})
				}
			},
			// A FUSE descriptor that is not mounted cannot be read.
			command: "stat -c '%a %u %g' /dev/fuse; cat 2>&1 < /dev/fuse | grep -o 'Operation not permitted'; cat 2>&1 < /dev/net/tun | grep -o 'File descriptor.*'; echo x > /dev/my-null && stat -c '%t %T' /dev/my-null",
			stdout:  lines("640 1000 5", "Operation not permitted", "File descriptor in bad state", "1 3"),
		},
		{
			name:    "device that is not allowed",
			command: "mknod /tmp/kmsg c 1 11 && head -c 1 /tmp/kmsg 2>&1 | grep -o 'Operation not permitted'; mknod /tmp/null c 1 3; echo x > /tmp/null && echo yes",
			stdout:  lines("Operation not permitted", "yes"),
		},
		{
			name: "privileged",
			spec: privileged,
			command: "grep CapEff /proc/self/status; mount -t tmpfs t /mnt && echo mounted; head -c 1 /dev/kmsg > /dev/null && echo kmsg; " +
				"echo 1 > /proc/sys/vm/overcommit_memory && echo sysctl; mkdir /sys/fs/cgroup/x && rmdir /sys/fs/cgroup/x && echo cgroup; mknod /tmp/k c 1 11 && head -c 1 /tmp/k > /dev/null && echo device",
			rootfs: files(map[string]string{"mnt/x": ""}),
			stdout: lines("CapEff:\t000001ffffffffff", "mounted", "kmsg", "sysctl", "cgroup", "device"),
			vmOnly: "it would be privileged on this machine",
		},
	})
}

// privileged is what clients make of --privileged with the runtime option
// privileged_without_host_devices.
func privileged(s *specs.Spec) {
	all := allCaps()
	s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}
	s.Process.NoNewPrivileges = false
	s.Linux.MaskedPaths, s.Linux.ReadonlyPaths, s.Linux.Seccomp = nil, nil, nil
	s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	for i, m := range s.Mounts {
		for j, o := range m.Options {
			if o == "ro" && strings.HasPrefix(m.Destination, "/sys") {
				s.Mounts[i].Options[j] = "rw"
			}
		}
	}
}
