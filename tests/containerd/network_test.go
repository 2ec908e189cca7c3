package containerd

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
)

// TestNerdctlNetworks has the interfaces that nerdctl's hooks make, before the
// virtual machine boots.
func TestNerdctlNetworks(t *testing.T) {
	e := start(t, "2.4", "nerdctl", "cni")
	ctx := env.Context(t)
	nerdctl := func(args ...string) string {
		t.Helper()
		out, err := e.Nerdctl(ctx, args...).Run()
		if err != nil {
			t.Fatalf("nerdctl %s: %v", strings.Join(args, " "), err)
		}
		return strings.TrimSpace(out)
	}
	nerdctl("network", "create", "other")
	t.Cleanup(func() {
		// The test's own context has ended by now.
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		for _, args := range [][]string{{"rm", "-f", "web"}, {"rm", "-f", "client"}, {"network", "rm", "other"}} {
			if _, err := e.Nerdctl(ctx, args...).Run(); err != nil {
				t.Error(err)
			}
		}
	})
	run := []string{"run", "-d", "--runtime", runtimeName}
	// This one's port has the portmap plugin make its chains. nerdctl sets up the
	// next one's two networks at once, and portmap races with itself for them.
	nerdctl(append(run, "--name", "client", "-p", "18089:8080", "--net", "other", image.BusyboxName, "sleep", "1000")...)
	nerdctl(append(run, "--name", "web", "-p", "18088:8080", "--net", "bridge", "--net", "other", image.BusyboxName,
		"sh", "-c", "mkdir /srv; echo web > /srv/index.html; exec httpd -f -p 8080 -h /srv")...)

	addresses := map[string]string{}
	for _, name := range []string{"eth0", "eth1"} {
		out := nerdctl("exec", "web", "ip", "-4", "-o", "addr", "show", "dev", name)
		fields := strings.Fields(out)
		if len(fields) < 4 {
			t.Fatalf("%s of the container = %q; want an address", name, out)
		}
		addresses[name], _, _ = strings.Cut(fields[3], "/")
	}
	host := nerdctl("exec", "web", "sh", "-c", "ip route | awk '/^default/ { print $3; exit }'")
	for _, address := range []string{addresses["eth0"] + ":8080", addresses["eth1"] + ":8080", host + ":18088"} {
		if got := page(t, e, address); got != "web" {
			t.Errorf("http://%s/ = %q; want web", address, got)
		}
	}
	got := nerdctl("exec", "client", "sh", "-c", "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 "+addresses["eth1"]+" 8080")
	if !strings.HasSuffix(got, "web") {
		t.Errorf("another container gets %q; want web", got)
	}
	if got := nerdctl("exec", "web", "grep", "-c", "nameserver", "/etc/resolv.conf"); got == "0" {
		t.Error("the container has no name server")
	}
}

// page gets a page within the environment's network, as soon as it is served.
func page(t *testing.T, e *env.Env, address string) string {
	t.Helper()
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, network, addr string) (net.Conn, error) { return e.Dial(ctx, network, addr) },
	}}
	for deadline := time.Now().Add(terminalTimeout); ; time.Sleep(100 * time.Millisecond) {
		resp, err := client.Get("http://" + address + "/")
		if err == nil {
			defer resp.Body.Close()
			b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
			if err != nil {
				t.Error(err)
			}
			return strings.TrimSpace(string(b))
		}
		if time.Now().After(deadline) {
			t.Error(err)
			return ""
		}
	}
}
