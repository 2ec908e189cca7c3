package cri

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
)

// hostNetwork is what makes a pod or a container one with the host's network.
var hostNetwork = env.Object{"security_context": env.Object{"namespace_options": env.Object{"network": 2}}}

// addCard gives the environment, which is the host of its pods, an interface.
func addCard(t *testing.T, e *env.Env, name, address string) {
	t.Helper()
	for _, args := range [][]string{
		{"link", "add", name, "type", "bridge"}, {"addr", "add", address, "dev", name}, {"link", "set", name, "up"},
	} {
		if _, err := e.Command(env.Context(t), "ip", args...).Run(); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if _, err := e.Command(ctx, "ip", "link", "del", name).Run(); err != nil {
			t.Error(err)
		}
	})
}

// announce listens in the environment and tells each connection text and who it
// is. It returns the address.
func announce(t *testing.T, e *env.Env, address, text string) string {
	t.Helper()
	l, err := e.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
			fmt.Fprintf(c, "%s for %s\n", text, host)
			c.Close()
		}
	}()
	return l.Addr().String()
}

func (p *pod) runInHostNetwork(name, script string) string {
	p.t.Helper()
	id, err := p.Pod.Run(p.ctx, name, image.BusyboxName, env.Object{"command": []string{"sh", "-c", script}, "linux": hostNetwork})
	if err != nil {
		p.t.Fatal(err)
	}
	return id
}

// ask gets a page in the environment, at once.
func ask(e *env.Env, address string) (string, error) {
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: e.Dial, DisableKeepAlives: true}}
	return get(client, "http://"+address+"/")
}

// await asks until ok is satisfied, which takes as long as a port is noticed.
func await(t *testing.T, e *env.Env, address string, ok func(string, error) bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		out, err := ask(e, address)
		if ok(out, err) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("http://%s says %q, %v", address, out, err)
		}
	}
}

func says(want string) func(string, error) bool {
	return func(out string, err error) bool { return err == nil && out == want }
}

func refused(_ string, err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED)
}

const webServer = "mkdir -p /www; echo from the pod >/www/index.html; httpd -p 8888 -h /www; httpd -p 127.0.0.1:8889 -h /www; sleep 100000"

func TestHostNetwork(t *testing.T) {
	inModes(t, func(t *testing.T, e *env.Env) {
		if _, err := exec.LookPath("passt"); err != nil {
			env.SkipOrFail(t, "needs the package passt: %v", err)
		}
		addCard(t, e, "card0", "10.6.0.1/24")
		addCard(t, e, "card1", "10.7.0.1/24")
		far := announce(t, e, "10.7.0.1:0", "other card")
		all := announce(t, e, "0.0.0.0:0", "any address")
		local := announce(t, e, "127.0.0.1:0", "loopback")
		_, anyPort, _ := net.SplitHostPort(all)
		p := runPod(t, e, "hostnet", env.Object{"linux": hostNetwork})
		web := p.runInHostNetwork("web", webServer)

		t.Run("like the host", func(t *testing.T) {
			name, err := os.Hostname()
			if got := p.sh(web, "hostname"); got != name || err != nil {
				t.Errorf("hostname = %q; want %q, %v", got, name, err)
			}
			if got := p.sh(web, "ip -o -4 addr show card0"); !strings.Contains(got, "10.6.0.1/24") {
				t.Errorf("addresses of card0 = %q; want the host's", got)
			}
			_, port, _ := net.SplitHostPort(local)
			if got := p.sh(web, "netstat -lnt"); !strings.Contains(got, "127.0.0.1:"+port) {
				t.Errorf("netstat in the pod has no 127.0.0.1:%s, which the host has:\n%s", port, got)
			}
			if got := p.sh(web, "nc -l -p "+port+" 2>&1 || true"); !strings.Contains(got, "in use") {
				t.Errorf("listen at a port of the host's = %q; want that it is in use", got)
			}
		})
		t.Run("pod to host", func(t *testing.T) {
			// nc would end its direction at once without a standard input that
			// stays open, which Debian 12's passt cannot deal with.
			p.sh(web, "mkfifo /tmp/open")
			for _, tc := range []struct{ address, want string }{
				{far, "other card for 10.7.0.1"},
				{local, "loopback for 127.0.0.1"},
				{"127.0.0.1:" + anyPort, "any address for 127.0.0.1"},
				{"10.6.0.1:" + anyPort, "any address for 10.6.0.1"},
				{"10.7.0.1:" + anyPort, "any address for 10.7.0.1"},
			} {
				host, port, _ := net.SplitHostPort(tc.address)
				if got := p.sh(web, fmt.Sprintf("timeout 10 nc %s %s <>/tmp/open", host, port)); got != tc.want {
					t.Errorf("at %s, pod hears %q; want %q", tc.address, got, tc.want)
				}
			}
		})
		t.Run("host to pod", func(t *testing.T) {
			await(t, e, "127.0.0.1:8889", says("from the pod"))
			for _, address := range []string{"127.0.0.1:8888", "10.6.0.1:8888", "10.7.0.1:8888"} {
				if out, err := ask(e, address); out != "from the pod" || err != nil {
					t.Errorf("http://%s says %q, %v; want what the pod serves", address, out, err)
				}
			}
			if out, err := ask(e, "10.6.0.1:8889"); !refused(out, err) {
				t.Errorf("a port of the pod's loopback at another address says %q, %v; want it refused", out, err)
			}
		})
		t.Run("port-forward", func(t *testing.T) { portForward(t, p) })
		t.Run("port is closed", func(t *testing.T) {
			p.sh(web, `kill $(pidof httpd)`)
			await(t, e, "127.0.0.1:8888", refused)
			await(t, e, "127.0.0.1:8889", refused)
		})
		t.Run("pod is removed", func(t *testing.T) {
			second := runPod(t, e, "second", env.Object{"linux": hostNetwork})
			second.runInHostNetwork("web", webServer)
			await(t, e, "127.0.0.1:8888", says("from the pod"))
			// A pod's port is every pod's.
			p.sh(web, "until netstat -lnt | grep -q :8888; do sleep 0.1; done")
			if got := p.sh(web, `printf 'GET / HTTP/1.0\r\n\r\n' | nc -w 5 127.0.0.1 8888 | tail -n 1`); got != "from the pod" {
				t.Errorf("one pod at the port of another: %q; want what that one serves", got)
			}
			if _, err := e.Crictl(second.ctx, "stopp", second.ID).Run(); err != nil {
				t.Fatal(err)
			}
			if out, err := ask(e, "127.0.0.1:8888"); !refused(out, err) {
				t.Errorf("port of a pod that was stopped says %q, %v; want it refused", out, err)
			}
		})
		t.Run("connection to the network is lost", func(t *testing.T) {
			pid, err := e.Command(p.ctx, "busybox", "pidof", "passt").Run()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := e.Command(p.ctx, "kill", "-9", strings.TrimSpace(pid)).Run(); err != nil {
				t.Fatal(err)
			}
			p.awaitState("SANDBOX_NOTREADY")
			if c := p.awaitExit(web); c.Status.ExitCode != 137 {
				t.Errorf("container of a pod that was cut off = %+v; want it killed", c)
			}
			if log := e.Log(); !strings.Contains(log, "connection to the host's network ended: passt: killed") {
				t.Errorf("the log does not say why the pod has ended:\n%s", e.LogTail(20))
			}
		})
	})
}

// portForward reaches the pod's server as `kubectl port-forward` does.
func portForward(t *testing.T, p *pod) {
	cmd := p.e.Crictl(p.ctx, "port-forward", p.ID, "0:8888")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Cancel()
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var port int
		if _, err := fmt.Sscanf(lines.Text(), "Forwarding from 127.0.0.1:%d", &port); err != nil {
			continue
		}
		go io.Copy(io.Discard, out)
		if got, err := ask(p.e, fmt.Sprintf("127.0.0.1:%d", port)); got != "from the pod" || err != nil {
			t.Errorf("forwarded port says %q, %v; want what the pod serves", got, err)
		}
		return
	}
	t.Errorf("crictl port-forward ended without forwarding: %v", lines.Err())
}

// Without an interface there is only loopback, on the host as in the pod.
func TestHostNetworkLoopback(t *testing.T) {
	e := start(t, env.Modes[0])
	local := announce(t, e, "127.0.0.1:0", "loopback")
	p := runPod(t, e, "hostnet", env.Object{"linux": hostNetwork})
	web := p.runInHostNetwork("web", webServer)
	await(t, e, "127.0.0.1:8889", says("from the pod"))
	host, port, _ := net.SplitHostPort(local)
	if got := p.sh(web, fmt.Sprintf("timeout 40 nc %s %s", host, port)); got != "loopback for 127.0.0.1" {
		t.Errorf("pod hears %q from the host's loopback; want what is there", got)
	}
	if log := e.Log(); !strings.Contains(log, "the host's network is its loopback interface alone") {
		t.Errorf("the log does not say so:\n%s", e.LogTail(20))
	}
}

func TestHostNetworkWithoutPasst(t *testing.T) {
	for _, mode := range env.Modes {
		t.Run(mode, func(t *testing.T) {
			e := startWith(t, env.CRI{Sandboxer: mode}, `passt = "/nonexistent/passt"`)
			addCard(t, e, "card0", "10.6.0.1/24")
			_, err := e.RunPod(env.Context(t), "hostnet", env.Object{"linux": hostNetwork})
			if err == nil || !strings.Contains(err.Error(), "the host's network needs passt: install the package passt") {
				t.Errorf("RunPod() without passt = %v; want an error that names the package", err)
			}
		})
	}
}
