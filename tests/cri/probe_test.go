package cri

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
)

// probePort is where probes serve, by TCP and by UDP.
const probePort = 7000

// at is an address of either family with a port.
func at(ip string, port int) string {
	if strings.Contains(ip, ":") {
		return fmt.Sprintf("[%s]:%d", ip, port)
	}
	return fmt.Sprintf("%s:%d", ip, port)
}

// exchange sends messages of all sizes by TCP and UDP to a probe that serves,
// and back, by run, which runs a probe.
func exchange(t *testing.T, what, address string, run func(args ...string) (string, error)) {
	t.Helper()
	if _, err := run("check", address); err != nil {
		t.Errorf("%s: %v", what, err)
	}
}

// probeIn runs a probe in a container.
func (p *pod) probeIn(id string) func(args ...string) (string, error) {
	return func(args ...string) (string, error) {
		return p.e.Crictl(p.ctx, append([]string{"exec", "-s", id, "probe"}, args...)...).Run()
	}
}

// hostProbe serves on the host, and in the network namespace named outside,
// which knows no way to the pods and is next to the host, until the test ends.
// It returns a runner of probes for each.
func hostProbe(t *testing.T, e *env.Env) (onHost, outside func(args ...string) (string, error)) {
	t.Helper()
	b, err := image.Program(env.Context(t), "probe")
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(e.Dir, "probe")
	if err := os.WriteFile(program, b, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"netns add outside", "link add near type veth peer name far netns outside",
		"addr add 192.0.2.1/24 dev near", "link set near up",
		"-n outside addr add 192.0.2.2/24 dev far", "-n outside link set far up", "-n outside link set lo up",
	} {
		if _, err := e.Command(env.Context(t), "ip", strings.Fields(line)...).Run(); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		for _, line := range []string{"link del near", "netns del outside"} {
			if _, err := e.Command(ctx, "ip", strings.Fields(line)...).Run(); err != nil {
				t.Error(err)
			}
		}
		// The mount point of all names, which ip makes and keeps.
		_, _ = e.Command(ctx, "umount", "/run/netns").Run()
	})
	runner := func(prefix ...string) func(args ...string) (string, error) {
		command := func(args ...string) *env.Cmd {
			all := append(append(prefix, program), args...)
			return e.Command(env.Context(t), all[0], all[1:]...)
		}
		server := command("serve", fmt.Sprintf(":%d", probePort))
		out, err := server.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := server.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			server.Cancel()
			server.Wait()
		})
		if _, err := out.Read(make([]byte, 1)); err != nil { // it says that it serves
			t.Fatalf("probe on the host: %v", err)
		}
		return func(args ...string) (string, error) { return command(args...).Run() }
	}
	return runner(), runner("ip", "netns", "exec", "outside")
}
