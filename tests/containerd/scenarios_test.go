package containerd

import "github.com/vmrt/vmrt/tests/env/image"

const busybox = image.BusyboxName

// nerdctlScenarios are about one container each.
var nerdctlScenarios = []scenario{
	{"output", [][]string{{"RUN", "--rm", busybox, "sh", "-c", "echo out; echo err >&2"}}},
	{"exit code", [][]string{{"RUN", "--rm", busybox, "sh", "-c", "exit 42"}}},
	{"missing program", [][]string{{"RUN", "--rm", busybox, "no-such-program"}}},
	{"user and groups", [][]string{{"RUN", "--rm", "--user", "1002:1002", "--group-add", "50000", busybox, "id"}}},
	{"bad user", [][]string{{"RUN", "--rm", "--user", "nobody-here", busybox, "id"}}},
	{"workdir", [][]string{{"RUN", "--rm", "--workdir", "/tmp/new", busybox, "pwd"}}},
	{"env and hostname", [][]string{{"RUN", "--rm", "--hostname", "box", "-e", "A=b c", busybox, "sh", "-c", "echo $A; hostname"}}},
	{"capabilities", [][]string{{"RUN", "--rm", "--cap-drop", "ALL", "--cap-add", "NET_RAW", busybox, "grep", "Cap", "/proc/self/status"}}},
	{"default capabilities", [][]string{{"RUN", "--rm", busybox, "grep", "Cap[IPEB]", "/proc/self/status"}}},
	{"no new privileges", [][]string{{"RUN", "--rm", "--security-opt", "no-new-privileges", busybox, "grep", "NoNewPrivs", "/proc/self/status"}}},
	{"seccomp", [][]string{{"RUN", "--rm", busybox, "grep", "Seccomp:", "/proc/self/status"}}},
	{"seccomp unconfined", [][]string{{"RUN", "--rm", "--security-opt", "seccomp=unconfined", busybox, "grep", "Seccomp:", "/proc/self/status"}}},
	{"read-only root", [][]string{{"RUN", "--rm", "--read-only", busybox, "touch", "/file"}}},
	{"tmpfs", [][]string{{"RUN", "--rm", "--tmpfs", "/t:size=1m,mode=1770", busybox, "sh", "-c", "stat -c %a /t; df -k /t | tail -1 | awk '{print $2}'"}}},
	{"shm size", [][]string{{"RUN", "--rm", "--shm-size", "8m", busybox, "sh", "-c", "df -k /dev/shm | tail -1 | awk '{print $2}'"}}},
	{"ulimit", [][]string{{"RUN", "--rm", "--ulimit", "nofile=123:456", busybox, "sh", "-c", "ulimit -n; ulimit -Hn"}}},
	{"sysctl", [][]string{{"RUN", "--rm", "--sysctl", "kernel.shmmax=12345", busybox, "cat", "/proc/sys/kernel/shmmax"}}},
	{"masked path", [][]string{{"RUN", "--rm", busybox, "sh", "-c", "wc -c < /proc/keys; echo x > /proc/sysrq-trigger"}}},
	{"pids", [][]string{{"RUN", "--rm", busybox, "sh", "-c", "echo $$"}}},
	{"exec", [][]string{
		{"RUN", "-d", "--name", "box", busybox, "sleep", "1000"},
		{"exec", "box", "echo", "hi"},
		{"exec", "box", "sh", "-c", "exit 7"},
		{"exec", "box", "no-such-program"},
		{"exec", "box", "/etc/passwd"},
		{"exec", "--workdir", "/nowhere", "box", "pwd"},
		{"exec", "--user", "1002", "box", "id", "-u"},
		{"exec", "box", "echo", "alive"},
		{"rm", "-f", "box"},
	}},
	{"stop", [][]string{
		{"RUN", "-d", "--name", "box", busybox, "sh", "-c", "trap 'exit 3' TERM; touch /ready; while :; do sleep 0.1; done"},
		{"exec", "box", "sh", "-c", "until [ -e /ready ]; do sleep 0.1; done"},
		{"stop", "box"},
		{"inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "box"},
		{"rm", "box"},
	}},
	{"kill", [][]string{
		{"RUN", "-d", "--name", "box", busybox, "sleep", "1000"},
		{"kill", "-s", "KILL", "box"},
		{"wait", "box"},
		{"inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "box"},
		{"rm", "box"},
	}},
	{"pause", [][]string{
		{"RUN", "-d", "--name", "box", busybox, "sleep", "1000"},
		{"pause", "box"},
		{"inspect", "-f", "{{.State.Status}}", "box"},
		{"unpause", "box"},
		{"inspect", "-f", "{{.State.Status}}", "box"},
		{"rm", "-f", "box"},
	}},
	{"restart", [][]string{
		{"RUN", "-d", "--name", "box", busybox, "sh", "-c", "echo run >> /runs; wc -l < /runs; exec sleep 1000"},
		{"restart", "-t", "0", "box"},
		{"exec", "box", "wc", "-l", "/runs"},
		{"rm", "-f", "box"},
	}},
	{"commit", [][]string{
		{"RUN", "-d", "--name", "box", busybox, "sh", "-c", "echo made > /made; sleep 1000"},
		{"exec", "box", "sh", "-c", "until [ -e /made ]; do sleep 0.1; done"},
		{"commit", "box", "committed:latest"},
		{"rm", "-f", "box"},
		{"RUN", "--rm", "committed:latest", "cat", "/made"},
		{"rmi", "-f", "committed:latest"},
	}},
	{"cp", [][]string{
		{"RUN", "-d", "--name", "box", busybox, "sleep", "1000"},
		{"cp", "DIR/in", "box:/tmp/in"},
		{"exec", "box", "cat", "/tmp/in"},
		{"exec", "box", "sh", "-c", "echo from the container > /tmp/out"},
		{"cp", "box:/tmp/out", "DIR/out"},
		{"rm", "-f", "box"},
	}},
	{"logs", [][]string{
		{"RUN", "-d", "--name", "box", busybox, "sh", "-c", "echo one; echo two; exit 5"},
		{"wait", "box"},
		{"logs", "box"},
		{"rm", "box"},
	}},
}
