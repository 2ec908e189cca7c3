package containerd

// limits prints memory, CPU and pids limits, of cgroup v2 or v1.
const limits = `
cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes
cat /sys/fs/cgroup/cpu.max 2>/dev/null || echo $(cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu/cpu.cfs_period_us)
cat /sys/fs/cgroup/pids.max 2>/dev/null || cat /sys/fs/cgroup/pids/pids.max`

// nerdctlOptions are flags of nerdctl's run, and what a container sees of them.
var nerdctlOptions = []scenario{
	{"env file and labels", [][]string{
		{"RUN", "-d", "--name", "box", "--env-file", "DIR/env", "--label", "k=v", busybox, "sh", "-c", "echo $FROM_FILE"},
		{"wait", "box"},
		{"logs", "box"},
		{"inspect", "-f", "{{index .Config.Labels \"k\"}}", "box"},
		{"rm", "box"},
	}},
	{"limits", [][]string{{"RUN", "--rm", "--memory", "64m", "--cpus", "0.5", "--pids-limit", "20", busybox, "sh", "-c", limits}}},
	{"pids limit", [][]string{{"RUN", "--rm", "--pids-limit", "20", busybox, "sh", "-c", "for i in $(seq 30); do sleep 2 & done"}}},
	{"out of memory", [][]string{{"RUN", "--rm", "--memory", "32m", "--memory-swap", "32m", busybox, "tail", "/dev/zero"}}},
	{"no OOM killer", [][]string{{"RUN", "--rm", "--memory", "64m", "--oom-kill-disable", busybox, "echo", "runs"}}},
	{"OOM score", [][]string{{"RUN", "--rm", "--oom-score-adj", "500", busybox, "cat", "/proc/self/oom_score_adj"}}},
	{"seccomp profile", [][]string{{"RUN", "--rm", "--security-opt", "seccomp=DIR/seccomp.json", busybox, "mkdir", "/made"}}},
	{"device", [][]string{{"RUN", "--rm", "--device", "/dev/null:/dev/mine:rw", busybox, "sh", "-c",
		"stat -c '%t %T %a' /dev/mine; echo x > /dev/mine; dd if=/dev/mine bs=1 count=1 | wc -c; mknod /dev/other c 1 11 && cat /dev/other"}}},
	{"read-only root with a tmpfs and a volume", [][]string{{"RUN", "--rm", "--read-only", "--tmpfs", "/t", "-v", "DIR:/v", busybox, "sh", "-c",
		"echo x > /t/f && cat /t/f; echo y > /v/out; touch /etc/f"}}},
	{"mounts", [][]string{{"RUN", "--rm", "--mount", "type=bind,src=DIR,dst=/v,ro", "--mount", "type=tmpfs,dst=/m,tmpfs-size=1m,tmpfs-mode=0700", busybox, "sh", "-c",
		"cat /v/in; touch /v/x; stat -c %a /m; df -k /m | tail -1 | awk '{print $2}'"}}},
	{"named user", [][]string{{"RUN", "--rm", "--user", "www-data", busybox, "id"}}},
	{"domain name", [][]string{{"RUN", "--rm", "--hostname", "box", "--domainname", "example.org", busybox, "cat", "/proc/sys/kernel/domainname"}}},
	{"network sysctl", [][]string{{"RUN", "--rm", "--sysctl", "net.ipv4.ip_unprivileged_port_start=80", busybox, "cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"}}},
	{"bad sysctl", [][]string{{"RUN", "--rm", "--sysctl", "kernel.no_such=1", busybox, "true"}}},
	{"init", [][]string{{"RUN", "--rm", "--init-binary", "tini-static", busybox, "sh", "-c", "cat /proc/1/comm; exit 9"}}},
	// Not to the input's end: nerdctl loses that if it comes during the creation,
	// with runc as well. TestStdinEndsAtOnce of the conformance suite is about it.
	{"input", [][]string{{"SH", "seq 3 | nerdctl RUN --rm -i busybox head -n 3"}}},
	{"stop signal", [][]string{
		{"RUN", "-d", "--name", "box", "--stop-signal", "USR1", busybox, "sh", "-c", "trap 'echo stopped; exit 4' USR1; echo ready; while :; do sleep 0.1; done"},
		{"UNTIL", "ready\n", "logs", "box"},
		{"stop", "box"},
		{"logs", "box"},
		{"inspect", "-f", "{{.State.ExitCode}}", "box"},
		{"rm", "box"},
	}},
	{"same name", [][]string{
		{"RUN", "-d", "--name", "box", busybox, "sleep", "1000"},
		{"RUN", "-d", "--name", "box", busybox, "sleep", "1000"},
		{"rm", "-f", "box"},
	}},
}

// nerdctlCommands are nerdctl's other commands on a container.
var nerdctlCommands = []scenario{
	{"inspect", [][]string{
		{"RUN", "-d", "--name", "box", "-v", "DIR:/v:ro", "--user", "1002", "--workdir", "/tmp", "--hostname", "h", "--memory", "64m", busybox, "sleep", "1000"},
		{"inspect", "-f", inspectDocker, "box"},
		{"inspect", "--mode", "native", "-f", inspectNative, "box"},
		{"pause", "box"},
		{"inspect", "-f", inspectDocker, "box"},
		{"unpause", "box"},
		{"kill", "box"},
		{"wait", "box"},
		{"inspect", "-f", inspectDocker, "box"},
		{"inspect", "--mode", "native", "-f", inspectNative, "box"},
		{"ps", "-a", "--format", "{{.Names}} {{.Command}}"},
		{"rm", "box"},
		{"inspect", "box"},
	}},
	{"exec options", [][]string{
		{"RUN", "-d", "--name", "box", busybox, "sleep", "1000"},
		{"exec", "-u", "www-data", "-w", "/tmp", "-e", "A=b", "--env-file", "DIR/env", "box", "sh", "-c", "id; pwd; echo $A $FROM_FILE"},
		{"exec", "-u", "nobody-here", "box", "id"},
		{"SH", "seq 3 | nerdctl exec -i box wc -l"},
		{"exec", "-d", "box", "sh", "-c", "echo made > /tmp/made"},
		{"UNTIL", "made\n", "exec", "box", "cat", "/tmp/made"},
		{"exec", "box", "sh", "-c", "kill -9 $$"},
		{"exec", "box", "grep", "-E", "CapEff|Seccomp:|NoNewPrivs", "/proc/self/status"},
		{"exec", "--privileged", "box", "sh", "-c", "mkdir -p /mnt/m && mount -t tmpfs t /mnt/m && echo mounted"},
		{"pause", "box"},
		{"exec", "box", "true"},
		{"unpause", "box"},
		{"kill", "box"},
		{"wait", "box"},
		{"exec", "box", "true"},
		{"rm", "box"},
	}},
	{"logs while it runs", [][]string{
		{"RUN", "-d", "--name", "box", busybox, "sh", "-c", "for i in 1 2 3 4; do echo $i; sleep 0.3; done; exit 2"},
		{"logs", "-f", "box"},
		{"logs", "--tail", "1", "box"},
		{"wait", "box"},
		{"rm", "box"},
	}},
	// The process lasts a moment: nerdctl's start -a of one that ends at once has
	// been seen to wait for ever, with runc too.
	{"start again", [][]string{
		{"CREATE", "--name", "box", busybox, "sh", "-c", "echo run >> /runs; cat /runs; sleep 1; exit 6"},
		{"start", "-a", "box"},
		{"start", "-a", "box"},
		{"inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "box"},
		{"rm", "box"},
	}},
	{"never started", [][]string{
		{"CREATE", "--name", "box", busybox, "sleep", "1000"},
		{"inspect", "-f", "{{.State.Status}}", "box"},
		{"exec", "box", "true"},
		{"stop", "box"},
		{"rm", "box"},
	}},
	{"rename", [][]string{
		{"RUN", "-d", "--name", "box", busybox, "sleep", "1000"},
		{"rename", "box", "crate"},
		{"exec", "crate", "echo", "hi"},
		{"exec", "box", "echo", "hi"},
		{"rm", "-f", "crate"},
	}},
	{"update", [][]string{
		{"RUN", "-d", "--name", "box", "--memory", "64m", busybox, "sleep", "1000"},
		{"update", "--memory", "96m", "--cpu-period", "100000", "--cpu-quota", "25000", "--pids-limit", "50", "box"},
		{"exec", "box", "sh", "-c", limits},
		{"inspect", "-f", "{{.State.Status}}", "box"},
		{"rm", "-f", "box"},
	}},
	{"a signal that it handles", [][]string{
		{"RUN", "-d", "--name", "box", busybox, "sh", "-c", "trap 'echo got >> /got' HUP; echo ready; while :; do sleep 0.1; done"},
		{"UNTIL", "ready\n", "logs", "box"},
		{"kill", "-s", "HUP", "box"},
		{"UNTIL", "got\n", "exec", "box", "cat", "/got"},
		{"stop", "-t", "1", "box"},
		{"inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "box"},
		{"kill", "box"},
		{"rm", "box"},
	}},
	{"cp of folders", [][]string{
		{"RUN", "-d", "--name", "box", "-v", "files:/volume", busybox, "sleep", "1000"},
		{"cp", "DIR/tree", "box:/tmp/tree"},
		{"exec", "box", "sh", "-c", "cd /tmp/tree && find . | sort && stat -c '%a %n' a/run"},
		{"cp", "DIR/tree/.", "box:/volume"},
		{"exec", "box", "cat", "/volume/a/f"},
		{"exec", "box", "sh", "-c", "mkdir -p /srv/d && echo deep > /srv/d/f && ln -s d/f /srv/l"},
		{"cp", "box:/srv", "DIR/copy"},
		{"SH", "cat DIR/copy/d/f && readlink DIR/copy/l"},
		{"cp", "box:/missing", "DIR/none"},
		{"cp", "DIR/in", "box:/no/folder/in"},
		{"rm", "-f", "box"},
		{"volume", "rm", "files"},
	}},
	{"cp of a stopped container", [][]string{
		{"RUN", "-d", "--name", "box", busybox, "sh", "-c", "echo out > /tmp/out; cat /tmp/in; exec sleep 1"},
		{"wait", "box"},
		{"cp", "box:/tmp/out", "DIR/out"},
		{"cp", "DIR/in", "box:/tmp/in"},
		{"start", "-a", "box"},
		{"rm", "box"},
	}},
	{"diff and export", [][]string{
		{"RUN", "-d", "--name", "box", busybox, "sh", "-c", "echo made > /srv-made; rm /etc/group; echo x >> /etc/passwd"},
		{"wait", "box"},
		{"SH", "nerdctl diff box | grep -E 'srv|passwd|group' | sort"},
		{"SH", "nerdctl export box | tar -tf - srv-made etc/passwd"},
		{"commit", "--change", `CMD ["cat", "/srv-made"]`, "box", "committed:latest"},
		{"rm", "box"},
		{"RUN", "--rm", "committed:latest"},
		{"rmi", "-f", "committed:latest"},
	}},
}

const (
	inspectDocker = "{{.State.Status}} {{.State.Running}} {{.State.Paused}} {{.State.Restarting}} {{.State.ExitCode}} pid:{{if .State.Pid}}yes{{end}} " +
		"{{json .Mounts}} {{.Config.User}} {{.Config.WorkingDir}} {{.Config.Hostname}} {{.HostConfig.Memory}} {{.Path}} {{json .Args}}"
	inspectNative = "{{with .Process}}{{.Status.Status}} {{.Status.ExitStatus}} pid:{{if .Pid}}yes{{end}}{{end}} {{.Spec.process.args}} {{.Spec.hostname}}"
)

// badPrograms are files that look like programs and cannot be executed, which is
// known only after the start.
const badPrograms = "printf '#!/no/such\\n' > /interpreter; echo x > /garbage; : > /empty; chmod 755 /interpreter /garbage /empty; "

// failedStarts are ends that clients and scripts tell apart. Output goes to the
// log, as nerdctl itself may miss what a process says that ends at once.
var failedStarts = []scenario{
	{"programs that cannot be executed", [][]string{
		{"RUN", "-d", "--name", "box", busybox, "sh", "-c", badPrograms + "touch /made; exec sleep 1000"},
		{"exec", "box", "sh", "-c", "until [ -e /made ]; do sleep 0.1; done"},
		{"SH", "for p in interpreter garbage empty; do nerdctl exec box /$p 2>&1 | sed 's/.*msg=//'; done"},
		{"exec", "box", "/etc"},
		{"exec", "box", ""},
		{"exec", "--workdir", "/etc/passwd", "box", "pwd"},
		{"commit", "box", "bad:latest"},
		{"rm", "-f", "box"},
		{"SH", "for p in interpreter garbage empty; do nerdctl RUN -d --name box --entrypoint /$p bad:latest >/dev/null; " +
			"nerdctl wait box; nerdctl logs box 2>&1; nerdctl rm box; done"},
		{"RUN", "--rm", "--entrypoint", "/etc", "bad:latest"},
		{"RUN", "--rm", "--entrypoint", "/no/such", "bad:latest"},
		{"rmi", "-f", "bad:latest"},
	}},
	{"file in the place of a folder", [][]string{{"RUN", "--rm", "-v", "DIR/in:/bin", busybox, "true"}}},
	{"folder in the place of a file", [][]string{{"RUN", "--rm", "-v", "DIR/tree:/etc/passwd", busybox, "true"}}},
}

// restartScenarios need containerd's restart monitor. The containers write
// down each of their runs.
var restartScenarios = []scenario{
	{"on failure", [][]string{
		{"RUN", "-d", "--restart", "on-failure:2", "--name", "box", busybox, "sh", "-c", "echo run; exit 3"},
		{"UNTIL", "run\nrun\nrun\n", "logs", "box"},
		{"UNTIL", "exited 3 2\n", "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}} {{.RestartCount}}", "box"},
		{"rm", "box"},
	}},
	{"on failure without one", [][]string{
		{"RUN", "-d", "--restart", "on-failure", "--name", "box", busybox, "sh", "-c", "echo run >> /runs; [ $(wc -l < /runs) = 2 ]"},
		{"UNTIL", "exited 0 1\n", "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}} {{.RestartCount}}", "box"},
		{"rm", "box"},
	}},
	{"always", [][]string{
		{"RUN", "-d", "--restart", "always", "--name", "box", busybox, "sh", "-c", "echo run >> /runs; [ $(wc -l < /runs) = 1 ] || exec sleep 1000"},
		{"UNTIL", "2\n", "exec", "box", "sh", "-c", "wc -l < /runs"},
		{"stop", "-t", "0", "box"},
		{"inspect", "-f", "{{.State.Status}}", "box"},
		{"rm", "box"},
	}},
}
