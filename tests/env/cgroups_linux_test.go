package env

import "testing"

func TestV1Options(t *testing.T) {
	for _, tt := range []struct{ super, want string }{
		{"rw,memory", "memory"},
		{"rw,cpu,cpuacct", "cpu,cpuacct"},
		{"rw,xattr,name=systemd", "none,name=systemd"},
		{"rw,xattr,release_agent=/usr/lib/systemd/systemd-cgroups-agent,name=systemd", "none,name=systemd"},
		{"rw,clone_children,cpuset", "cpuset"},
	} {
		if got := v1Options(tt.super); got != tt.want {
			t.Errorf("v1Options(%q) = %q; want %q", tt.super, got, tt.want)
		}
	}
}
