package docker

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/tests/env"
)

// TestDocker has the interfaces of a container made by a prestart hook, before
// the virtual machine boots.
func TestDocker(t *testing.T) {
	d := start(t, "26")
	d.sub("run", testRun)
	d.sub("terminal", testTerminal)
	d.sub("life", testLife)
	d.sub("options", testOptions)
	d.sub("deaths", testDeaths)
	d.sub("default network", testDefaultNetwork)
	d.sub("networks", testNetworks)
	d.sub("names", testNames)
	d.sub("other networks", testOtherNetworks)
}

// TestLateNetworks has them arrive when the virtual machine runs already, as
// Docker's do since version 27.
func TestLateNetworks(t *testing.T) {
	d := start(t, "28")
	d.sub("default network", testDefaultNetwork)
	d.sub("networks", testNetworks)
	d.sub("too many networks", testTooManyNetworks)
	d.sub("names", testNames)
}

// testRun shows the same commands to runc and to vmrt.
func testRun(d docker) {
	type outcome struct {
		Out    string
		Code   int
		Phrase bool
	}
	run := func(runtime, stdin string, args []string, phrase string) outcome {
		d.Helper()
		cmd := d.env.Docker(d.ctx, append([]string{"run", "--rm", "-i", "--network", "none", "--runtime", runtime}, args...)...)
		cmd.Stdin = strings.NewReader(stdin)
		out, err := cmd.Run()
		return outcome{out, env.ExitCode(err), err != nil && strings.Contains(err.Error(), phrase)}
	}
	for _, tt := range []struct {
		name, stdin string
		args        []string
		phrase      string
	}{
		{"output and exit code", "", []string{busybox, "sh", "-c", "echo out; exit 42"}, ""},
		{"input", "in\n", []string{busybox, "cat"}, ""},
		{"missing program", "", []string{busybox, "no-such-program"}, "executable file not found in $PATH"},
		{"no permission", "", []string{busybox, "/etc/passwd"}, "permission denied"},
	} {
		want := run("runc", tt.stdin, tt.args, tt.phrase)
		got := run(runtimeName, tt.stdin, tt.args, tt.phrase)
		if diff := cmp.Diff(want, got); diff != "" {
			d.Errorf("%s: runc (-) and vmrt (+) differ:\n%s", tt.name, diff)
		}
	}
	host, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		d.Fatal(err)
	}
	// By the name that daemon.json gives.
	got := d.docker("run", "--rm", "--network", "none", "--runtime", "vmrt", busybox, "uname", "-r")
	if got == strings.TrimSpace(string(host)) {
		d.Errorf("uname -r = %q, the host's; want another kernel", got)
	}
	// With a configuration of its own, of 400 MiB.
	got = d.docker("run", "--rm", "--network", "none", "--runtime", "vmrt-large", busybox, "awk", "/MemTotal/ { print $2 }", "/proc/meminfo")
	if kib, err := strconv.Atoi(got); err != nil || kib < 340<<10 || kib > 400<<10 {
		d.Errorf("memory with another configuration = %q KiB; want almost 400 MiB", got)
	}
}

func testTerminal(d docker) {
	cmd := d.env.Docker(d.ctx, "run", "--rm", "-it", "--network", "none", "--runtime", runtimeName, busybox, "sh")
	term, err := cmd.StartTerminal(33, 99)
	if err != nil {
		d.Fatal(err)
	}
	defer term.Close()
	at, err := term.Expect(0, "# ", patience)
	if err != nil {
		d.Fatal(err)
	}
	// Docker sizes a terminal after the start.
	term.Type("until stty size | grep '33 99'; do sleep 0.1; done\n")
	if at, err = term.Expect(at, "\n33 99", patience); err != nil {
		d.Fatal(err)
	}
	if err := term.Resize(50, 120); err != nil {
		d.Fatal(err)
	}
	term.Type("until stty size | grep '50 120'; do sleep 0.1; done; exit 8\n")
	if _, err := term.Expect(at, "\n50 120", patience); err != nil {
		d.Error(err)
	}
	if got := env.ExitCode(cmd.Wait()); got != 8 {
		d.Errorf("exit code = %d; want 8", got)
	}
}

// testLife takes a container through Docker's commands.
func testLife(d docker) {
	dir := d.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("host\n"), 0o644); err != nil {
		d.Fatal(err)
	}
	d.run("-d", "--name", "life", "-v", dir+":/v", busybox, "sh", "-c",
		"trap 'exit 7' TERM; echo started; while :; do sleep 0.1; done")
	d.keep("life")
	d.until("started", "logs", "life")

	if got := d.docker("exec", "life", "sh", "-c", "cat /v/f; echo guest > /v/g"); got != "host" {
		d.Errorf("file of the volume = %q; want host", got)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "g")); string(got) != "guest\n" {
		d.Errorf("file written in the container = %q, %v; want guest", got, err)
	}
	d.fails(9, "", "exec", "life", "sh", "-c", "exit 9")
	d.fails(126, "executable file not found in $PATH", "exec", "life", "no-such-program")
	if got := d.docker("top", "life"); !strings.Contains(got, "vmrt: sh -c ") {
		d.Errorf("top = %q; want the anchor of sh", got)
	}
	got := d.docker("stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}} {{.MemUsage}}", "life")
	if !strings.HasPrefix(got, "life 2 ") || strings.Contains(got, " 0B /") {
		d.Errorf("stats = %q; want two processes and some memory", got)
	}
	d.docker("cp", filepath.Join(dir, "f"), "life:/root/copied")
	d.docker("cp", "life:/root/copied", filepath.Join(dir, "back"))
	if back, err := os.ReadFile(filepath.Join(dir, "back")); string(back) != "host\n" {
		d.Errorf("file copied to and fro = %q, %v; want host", back, err)
	}
	d.docker("pause", "life")
	d.until("paused", "inspect", "-f", "{{.State.Status}}", "life")
	d.docker("unpause", "life")

	d.docker("stop", "-t", "60", "life")
	d.until("exited 7", "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "life")
	d.docker("start", "life")
	d.until("started\nstarted", "logs", "life")
	if got := d.docker("exec", "life", "cat", "/root/copied"); got != "host" {
		d.Errorf("file after a new start = %q; want host", got)
	}
	d.docker("kill", "life")
	d.until("exited 137", "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "life")
}

// testOptions has many in one container.
func testOptions(d docker) {
	dir := d.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("file\n"), 0o644); err != nil {
		d.Fatal(err)
	}
	got := d.run("--rm", "--network", "none", "--init", "--read-only", "--tmpfs", "/t", "-v", dir+"/f:/f:ro", "-v", "named:/n",
		"--user", "www-data", "--workdir", "/tmp", "--env", "A=b", "--hostname", "box", "--memory", "300m", "--cpus", "2",
		"--cap-drop", "ALL", "--ulimit", "nofile=77", "--sysctl", "net.core.somaxconn=99", "--shm-size", "9m", busybox, "sh", "-c", `
		id -u; pwd; echo $A; hostname; nproc; ulimit -n; cat /f /sys/fs/cgroup/memory.max /proc/sys/net/core/somaxconn /proc/1/comm
		grep CapEff /proc/self/status; df -k /dev/shm | awk 'END { print $2 }'; touch /x 2>/dev/null || echo read-only; touch /t/x && echo tmpfs`)
	want := strings.Join([]string{"1002", "/tmp", "b", "box", "2", "77", "file", "314572800", "99", "tini-static",
		"CapEff:\t0000000000000000", "9216", "read-only", "tmpfs"}, "\n")
	// Docker calls it docker-init, by the place where it mounts it.
	got = strings.Replace(got, "\ndocker-init\n", "\ntini-static\n", 1)
	if diff := cmp.Diff(want, got); diff != "" {
		d.Errorf("what the container sees (-want +got):\n%s", diff)
	}
	d.docker("volume", "rm", "named")
	disk := filepath.Join(dir, "disk")
	if err := unix.Mknod(disk, unix.S_IFBLK|0o600, int(unix.Mkdev(7, 250))); err != nil {
		d.Fatal(err)
	}
	d.fails(125, "not present in the virtual machine", "run", "--rm", "--runtime", runtimeName, "--network", "none",
		"--device", disk+":/dev/disk0", busybox, "true")
}

// testDeaths is about what ends without Docker's doing.
func testDeaths(d docker) {
	d.run("-d", "--name", "again", "--restart", "on-failure", busybox, "sh", "-c", "echo up; exec sleep 1000")
	d.keep("again")
	d.until("up", "logs", "again")
	d.kill("again", "qemu-system")
	d.until("up\nup", "logs", "again")
	d.until("running 1", "inspect", "-f", "{{.State.Status}} {{.RestartCount}}", "again")

	d.run("-d", "--name", "box", busybox, "sleep", "1000")
	d.kill("box", "qemu-system")
	d.docker("rm", "-f", "box")

	d.run("-d", "--name", "box", "--network", "none", busybox, "sleep", "1000")
	d.kill("box", "containerd-shim-vmrt-v2")
	d.until("exited 137", "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "box")
	d.docker("rm", "box")
}
