package cgroup

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseMount(t *testing.T) {
	for _, tt := range []struct {
		line string
		want hierarchy
		ok   bool
	}{
		{"41 31 0:38 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate",
			hierarchy{root: "/sys/fs/cgroup", v2: true}, true},
		{"41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw", hierarchy{root: "/sys/fs/cgroup/unified", v2: true}, true},
		{"32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:10 - cgroup cgroup rw,cpu,cpuacct",
			hierarchy{root: "/sys/fs/cgroup/cpu,cpuacct", controllers: []string{"cpu", "cpuacct"}}, true},
		{"40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd",
			hierarchy{root: "/sys/fs/cgroup/systemd", controllers: []string{"name=systemd"}}, true},
		{"40 31 0:37 / /sys/fs/cgroup/openrc rw - cgroup cgroup rw,name=openrc", hierarchy{root: "/sys/fs/cgroup/openrc"}, false},
		{"41 31 0:38 / /run/pod/cgroup rw - cgroup2 cgroup2 rw", hierarchy{root: "/run/pod/cgroup"}, false},
		{"31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755", hierarchy{root: "/sys/fs/cgroup"}, false},
		{"31 23 0:28 / /sys/fs/cgroup", hierarchy{}, false},
		{"", hierarchy{}, false},
		{" - ", hierarchy{}, false},
	} {
		got, ok := parseMount(tt.line)
		if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(hierarchy{})); diff != "" || ok != tt.ok {
			t.Errorf("parseMount(%q) ok = %t; want %t (-want +got):\n%s", tt.line, ok, tt.ok, diff)
		}
	}
}
