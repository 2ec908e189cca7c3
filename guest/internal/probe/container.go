//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The container's own program is the probe again: argument "ask" tells what it
// sees and exits with exitCode, "wait" stays.
const (
	exitCode = 7
	bundle   = "/run/bundle"
)

// ask runs in a container and prints what the runtime made of its settings.
func ask() int {
	status := read("/proc/self/status")
	for _, field := range []string{"Seccomp:", "NoNewPrivs:", "CapEff:"} {
		_, after, _ := strings.Cut(status, "\n"+field)
		value, _, _ := strings.Cut(after, "\n")
		fmt.Print(field, strings.TrimSpace(value), " ")
	}
	fmt.Println("Sethostname:" + text(unix.Sethostname([]byte("x"))))
	return exitCode
}

// wantAsk is what ask prints in a container of settings.
const wantAsk = "Seccomp:2 NoNewPrivs:1 CapEff:0000000000000400 Sethostname:no message of desired type"

// settings are an OCI runtime configuration: one capability, and a seccomp
// filter that answers sethostname(2) with an error that no kernel would.
func settings(args ...string) map[string]any {
	caps := []string{"CAP_NET_BIND_SERVICE"}
	return map[string]any{
		"ociVersion": "1.1.0",
		"process": map[string]any{
			"args": args, "cwd": "/", "noNewPrivileges": true,
			"user":         map[string]any{"uid": 0, "gid": 0},
			"capabilities": map[string]any{"bounding": caps, "effective": caps, "permitted": caps},
		},
		"root": map[string]any{"path": "rootfs"},
		"mounts": []map[string]any{
			{"destination": "/proc", "type": "proc", "source": "proc"},
			{"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": []string{"mode=755", "size=65536k"}},
			{"destination": "/probe", "type": "bind", "source": "/init", "options": []string{"bind", "ro"}},
		},
		"linux": map[string]any{
			"cgroupsPath": "/probe",
			"resources": map[string]any{
				"memory":  map[string]any{"limit": 64 << 20},
				"devices": []map[string]any{{"allow": false, "access": "rwm"}},
			},
			"namespaces": []map[string]any{
				{"type": "pid"}, {"type": "mount"}, {"type": "uts"}, {"type": "ipc"}, {"type": "network"}, {"type": "cgroup"},
			},
			"seccomp": map[string]any{
				"defaultAction": "SCMP_ACT_ALLOW", "architectures": []string{"SCMP_ARCH_X86_64"},
				"syscalls": []map[string]any{
					{"names": []string{"sethostname"}, "action": "SCMP_ACT_ERRNO", "errnoRet": uint(unix.ENOMSG)},
				},
			},
		},
	}
}

// lifecycle takes a container of the initramfs's OCI runtime through what the
// agent asks of one.
func lifecycle() error {
	if err := mount("cgroup2", "cgroup2", "/sys/fs/cgroup", ""); err != nil {
		return err
	}
	if err := os.MkdirAll(bundle+"/rootfs", 0o755); err != nil {
		return err
	}
	if err := configure("/probe", "ask"); err != nil {
		return err
	}
	// Of an initramfs pivot_root(2) cannot move away.
	if err := asks("run", "--no-pivot", "--bundle", bundle, "one"); err != nil {
		return err
	}
	if err := configure("/probe", "wait"); err != nil {
		return err
	}
	process, err := writeJSON("process.json", settings("/probe", "ask")["process"])
	if err != nil {
		return err
	}
	for _, step := range []func() error{
		func() error { return crun("create", "--no-pivot", "--bundle", bundle, "two") },
		func() error { return crun("start", "two") },
		func() error { return asks("exec", "--process", process, "two") },
		func() error { return crun("pause", "two") },
		func() error { return crun("resume", "two") },
		func() error { return crun("update", "--memory", "33554432", "two") },
		func() error {
			if got := strings.TrimSpace(read("/sys/fs/cgroup/probe/memory.max")); got != "33554432" {
				return fmt.Errorf("memory.max after update = %q", got)
			}
			return nil
		},
		func() error { return crun("kill", "two", "KILL") },
		func() error { return crun("delete", "--force", "two") },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func configure(args ...string) error {
	_, err := writeJSON("config.json", settings(args...))
	return err
}

// writeJSON writes a file of the bundle and returns its path.
func writeJSON(name string, v any) (string, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return "", err
	}
	file := bundle + "/" + name
	return file, os.WriteFile(file, b, 0o600)
}

// asks runs the OCI runtime and expects what ask does.
func asks(args ...string) error {
	out, err := command(args)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != exitCode {
		return fmt.Errorf("crun %s: %v, want exit code %d: %s", args[0], err, exitCode, out)
	}
	if out != wantAsk {
		return fmt.Errorf("crun %s: the container printed %q, want %q", args[0], out, wantAsk)
	}
	return nil
}

func crun(args ...string) error {
	if out, err := command(args); err != nil {
		return fmt.Errorf("crun %s: %w: %s", args[0], err, out)
	}
	return nil
}

// command runs the OCI runtime. What it starts may keep the output open, so
// that goes to a file.
func command(args []string) (string, error) {
	f, err := os.CreateTemp("/run", "crun")
	if err != nil {
		return "", err
	}
	defer f.Close()
	cmd := exec.Command("/bin/crun", append([]string{"--root", "/run/crun"}, args...)...)
	cmd.Stdout, cmd.Stderr = f, f
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	return string(bytes.TrimSpace([]byte(read(f.Name())))), err
}
