package containerd

const cgroups = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro"

// userns shows what the root of a user namespace is and may do.
const userns = "cat /proc/self/uid_map /proc/self/gid_map; id; stat -c '%n %u:%g' / /bin /dev/null /dev/shm /mnt /mnt/mapped; " +
	"echo reopened > /dev/stdout; echo written > /file && chown 7:8 /file && stat -c '%n %u:%g' /file; touch /mnt/made; touch /mnt/mapped && echo touched; " +
	"hostname renamed && hostname; ip link set lo down && echo lo is down; ip link set lo up; mount -t tmpfs t /tmp; " +
	"ls /sys/class/net | grep -x lo; ls -d /sys/fs/cgroup; echo 1 > /proc/sys/net/ipv4/ip_forward; echo 5 > /proc/sys/kernel/pid_max; cat /proc/1/comm; nc -h 2>&1 | head -n 1"

// ctrScenarios are what ctr can do.
var ctrScenarios = []scenario{
	{"options", [][]string{{"RUN", "--rm", "--env", "A=b c", "--cwd", "/tmp", "--user", "1002:1002", "--hostname", "h", "--read-only",
		"--mount", "type=bind,src=DIR,dst=/mnt,options=rbind:ro", "--mount", "type=tmpfs,dst=/tmp,options=size=1m:mode=1777", busybox, "box", "sh", "-c",
		"echo $A; pwd; id; hostname; cat /mnt/in; touch /mnt/x; touch /tmp/x; touch /x"}}},
	{"output", [][]string{{"RUN", "--rm", busybox, "box", "sh", "-c", "echo out; echo err >&2; exit 42"}}},
	{"input", [][]string{{"SH", "seq 3 | ctr RUN --rm " + busybox + " box head -n 2"}}},
	{"limits", [][]string{{"RUN", "--rm", "--memory-limit", "67108864", "--cpus", "0.5", "--mount", cgroups, busybox, "box", "sh", "-c", limits}}},
	{"capabilities", [][]string{{"RUN", "--rm", "--cap-drop", "CAP_CHOWN", "--cap-add", "CAP_SYS_TIME", busybox, "box", "grep", "Cap[PEB]", "/proc/self/status"}}},
	{"privileged", [][]string{{"RUN", "--rm", "--privileged", busybox, "box", "sh", "-c",
		"mount -t tmpfs t /mnt && echo mounted; mknod /dev/mine c 1 3 && echo x > /dev/mine && echo written; [ -w /proc/sys ] && echo writable"}}},
	{"seccomp", [][]string{{"RUN", "--rm", "--seccomp", "--rlimit-nofile", "100", busybox, "box", "sh", "-c",
		"grep -E 'Seccomp:|NoNewPrivs' /proc/self/status; ulimit -n"}}},
	{"root file system of a folder", [][]string{
		{"SH", "mkdir -p DIR/root/bin && cp $(command -v busybox) DIR/root/bin/busybox && mkdir -p DIR/root/proc DIR/root/sys DIR/root/dev DIR/root/run"},
		{"RUN", "--rm", "--rootfs", "DIR/root", "box", "/bin/busybox", "sh", "-c", "echo kept > /out; cat /proc/self/comm"},
		{"SH", "cat DIR/root/out"},
	}},
	{"user namespace", [][]string{
		{"SH", "touch DIR/mapped && chown 1000:1000 DIR/mapped"},
		{"RUN", "--rm", "--uidmap", "0:1000:65536", "--gidmap", "0:1000:65536", "--remap-labels", "--cap-add", "CAP_NET_ADMIN",
			"--mount", "type=bind,src=DIR,dst=/mnt,options=rbind:rw", busybox, "box", "sh", "-c", userns},
		{"RUN", "--rm", "--uidmap", "0:1000:65536", "--gidmap", "0:1000:65536", "--remap-labels", "--user", "1002:1002", busybox, "box", "sh", "-c",
			"id; echo reopened > /dev/stdout; touch /x; touch /tmp/y && stat -c %u:%g /tmp/y /bin"},
		{"SH", "stat -c '%n %u:%g' DIR/made"},
		{"RUN", "--rm", "--uidmap", "1:1000:65536", "--gidmap", "1:1000:65536", busybox, "box", "id"},
	}},
	{"missing program", [][]string{{"RUN", "--rm", busybox, "box", "no-such-program"}}},
	{"missing folder", [][]string{{"RUN", "--rm", "--mount", "type=bind,src=DIR/none,dst=/mnt,options=rbind", busybox, "box", "true"}}},
	{"tasks", [][]string{
		{"RUN", "-d", busybox, "box", "sleep", "1000"},
		{"RUN", "-d", busybox, "box", "true"},
		{"SH", "ctr task ls | awk '{print $1, $3}'"},
		{"SH", "ctr task ps box | awk 'NR > 1 {print $1 > 0}'"},
		{"task", "exec", "--exec-id", "e", "box", "echo", "hi"},
		{"task", "exec", "--exec-id", "e", "--user", "1002", "--cwd", "/tmp", "box", "sh", "-c", "id -u; pwd; exit 7"},
		{"task", "exec", "--exec-id", "e", "box", "no-such-program"},
		{"task", "exec", "--exec-id", "e", "--cwd", "/no/folder", "box", "pwd"},
		{"SH", "seq 3 | ctr task exec --exec-id e box wc -l"},
		{"task", "pause", "box"},
		{"SH", "ctr task ls | awk '{print $1, $3}'"},
		{"task", "exec", "--exec-id", "e", "box", "true"},
		{"task", "resume", "box"},
		{"task", "exec", "--exec-id", "e", "box", "echo", "again"},
		{"task", "delete", "box"},
		{"task", "kill", "-s", "KILL", "box"},
		{"UNTIL", "box STOPPED\n", "SH", "ctr task ls | awk '$1 == \"box\" {print $1, $3}'"},
		{"task", "exec", "--exec-id", "e", "box", "true"},
		{"task", "kill", "box"},
		{"task", "delete", "box"},
		{"container", "delete", "box"},
		{"task", "ls"},
	}},
	{"signals to an exec", [][]string{
		{"RUN", "-d", busybox, "box", "sleep", "1000"},
		{"SH", "ctr task exec --exec-id long box sh -c 'echo $$ > /tmp/long; exec sleep 1000' & " +
			"until ctr task exec --exec-id look box test -s /tmp/long; do sleep 0.2; done; " +
			"ctr task kill --exec-id long -s TERM box; wait $!"},
		{"task", "kill", "--exec-id", "none", "box"},
		{"task", "exec", "--exec-id", "e", "box", "echo", "alive"},
		{"task", "kill", "-a", "-s", "KILL", "box"},
		{"UNTIL", "STOPPED\n", "SH", "ctr task ls | awk '$1 == \"box\" {print $3}'"},
		{"task", "delete", "box"},
		{"container", "delete", "box"},
	}},
	{"attach", [][]string{
		{"RUN", "-d", busybox, "box", "sh", "-c", "until [ -e /go ]; do sleep 0.1; done; echo attached; exit 6"},
		{"SH", "ctr task attach box & ctr task exec --exec-id e box touch /go; wait $!"},
		{"container", "delete", "box"},
	}},
	{"start again", [][]string{
		{"SH", "ctr container create --runtime $RUNTIME " + busybox + " box sh -c 'echo run >> /runs; cat /runs; exit 5'"},
		{"task", "start", "box"},
		{"task", "start", "box"},
		{"container", "delete", "box"},
	}},
}
