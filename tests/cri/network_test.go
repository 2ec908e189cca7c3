package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
)

// serve is a web server that answers with its pod's name.
const serve = "mkdir /srv; hostname > /srv/index.html; probe serve :7000 & exec httpd -f -p 8080 -h /srv"

// ips returns the addresses that CRI knows of the pod.
func (p *pod) ips() (all []string) {
	p.t.Helper()
	var s struct {
		Status struct {
			Network struct {
				IP            string
				AdditionalIps []struct{ IP string }
			}
		}
	}
	if err := json.Unmarshal([]byte(p.crictl("inspectp", p.ID)), &s); err != nil {
		p.t.Fatalf("crictl inspectp: %v", err)
	}
	all = append(all, s.Status.Network.IP)
	for _, a := range s.Status.Network.AdditionalIps {
		all = append(all, a.IP)
	}
	return all
}

// url is of a server at an address of either family.
func url(ip string, port int) string {
	if strings.Contains(ip, ":") {
		ip = "[" + ip + "]"
	}
	return fmt.Sprintf("http://%s:%d/", ip, port)
}

// fetch gets a page on the host, as soon as somebody serves it.
func fetch(t *testing.T, e *env.Env, url string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(env.Context(t), patience)
	defer cancel()
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: e.Dial, DisableKeepAlives: true}}
	for {
		page, err := get(client, url)
		if err == nil {
			return page
		}
		select {
		case <-ctx.Done():
			t.Errorf("get %s on the host: %v", url, err)
			return ""
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func get(client *http.Client, url string) (string, error) {
	resp, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	return strings.TrimSpace(string(b)), err
}

// fetchFrom gets a page in a container. A static busybox has no wget that
// works: it would load the C library's resolver.
func (p *pod) fetchFrom(id, ip string) string {
	p.t.Helper()
	const script = `i=0; until printf 'GET / HTTP/1.0\r\n\r\n' | nc -w 5 %s 8080 | sed '1,/^\r*$/d' | grep .; do
		i=$((i+1)); [ $i -lt 50 ] || exit 1; sleep 0.2; done`
	return p.sh(id, fmt.Sprintf(script, ip))
}

// setCNI replaces the environment's network for pods that are made from now on.
func setCNI(t *testing.T, e *env.Env, plugins ...env.Object) {
	t.Helper()
	dir := filepath.Join(e.Dir, "cni.d")
	old, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(env.Object{"cniVersion": "1.0.0", "name": t.Name()[strings.LastIndex(t.Name(), "/")+1:], "plugins": plugins})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(old[0], b, 0o644); err != nil {
		t.Fatal(err)
	}
	restart(t, e)
}

// ipam hands out addresses of both families.
func ipam(t *testing.T, n int) env.Object {
	return env.Object{
		"type": "host-local", "dataDir": t.TempDir(),
		"ranges": [][]env.Object{{{"subnet": fmt.Sprintf("10.9%d.0.0/16", n)}}, {{"subnet": fmt.Sprintf("fd00:9%d::/64", n)}}},
		"routes": []env.Object{{"dst": "0.0.0.0/0"}, {"dst": "::/0"}},
	}
}

// TestNetwork has pods on the networks that real CNI plugins make.
func TestNetwork(t *testing.T) {
	ctx := env.Context(t)
	probe, err := image.Probe(ctx)
	if err != nil {
		t.Fatal(err)
	}
	e := startCRI(t, env.CRI{Images: []image.Image{probe}})
	onHost, outside := hostProbe(t, e)
	// macvlan needs something to be on.
	if _, err := e.Command(ctx, "ip", "link", "add", "uplink", "type", "veth", "peer", "name", "outside").Run(); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range []string{
		"ip link set uplink up", "ip link set outside up", "ip addr add 10.93.255.1/16 dev outside", "ip addr add fd00:93::ffff/64 dev outside nodad",
	} {
		if _, err := e.Command(ctx, "sh", "-c", cmd).Run(); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if _, err := e.Command(context.Background(), "ip", "link", "del", "uplink").Run(); err != nil {
			t.Error(err)
		}
	})
	// Once something uses connection tracking (ipMasq, portmap), a bridge with an
	// MTU of 9000 drops IPv4 fragments, between network namespaces without any
	// virtual machine as well (br_netfilter, Linux 6.18): so it comes first.
	for _, n := range []struct {
		number  int // of the network, and of its addresses
		plugins []env.Object
	}{
		{4, []env.Object{{"type": "bridge", "bridge": "test4", "isGateway": true, "mtu": 9000, "ipam": ipam(t, 4)}}},
		{1, []env.Object{
			{"type": "bridge", "bridge": "test1", "isGateway": true, "hairpinMode": true, "ipMasq": true, "ipam": ipam(t, 1)},
			{"type": "portmap", "capabilities": env.Object{"portMappings": true}},
		}},
		{2, []env.Object{{"type": "ptp", "mtu": 1400, "ipam": ipam(t, 2)}}},
		{3, []env.Object{{"type": "macvlan", "master": "uplink", "mode": "bridge", "ipam": ipam(t, 3)}}},
	} {
		plugins := n.plugins
		t.Run(fmt.Sprint(plugins[0]["type"], n.number), func(t *testing.T) {
			setCNI(t, e, plugins...)
			testNetwork(t, e, plugins, onHost, outside)
		})
	}
}

func testNetwork(t *testing.T, e *env.Env, plugins []env.Object, onHost, outside func(args ...string) (string, error)) {
	config := env.Object{"hostname": "one"}
	mapped := len(plugins) > 1
	if mapped {
		config["port_mappings"] = []env.Object{
			{"protocol": 0, "container_port": 8080, "host_port": 18080},
			{"protocol": 0, "container_port": probePort, "host_port": 17000},
			{"protocol": 1, "container_port": probePort, "host_port": 17000},
		}
	}
	one, two := runPod(t, e, "one", config), runPod(t, e, "two", env.Object{"hostname": "two"})
	server, client := one.runImage("server", image.ProbeName, serve), two.runImage("client", image.ProbeName, "sleep 1000")
	addresses := one.ips()
	if len(addresses) != 2 {
		t.Fatalf("addresses of the pod = %q; want one of each family", addresses)
	}
	for _, ip := range addresses {
		// A macvlan's own host is the only one that cannot reach it.
		if got := fetch(t, e, url(ip, 8080)); got != "one" {
			t.Errorf("host gets %q of %s; want one", got, ip)
		}
		if got := two.fetchFrom(client, ip); got != "one" {
			t.Errorf("other pod gets %q of %s; want one", got, ip)
		}
		exchange(t, "pod to pod at "+ip, at(ip, probePort), two.probeIn(client))
		exchange(t, "host to pod at "+ip, at(ip, probePort), onHost)
	}
	for _, ip := range one.gateways(server, plugins) {
		exchange(t, "pod to host at "+ip, at(ip, probePort), one.probeIn(server))
	}
	if got := one.fetchFrom(server, "127.0.0.1"); got != "one" {
		t.Errorf("the pod itself gets %q; want one", got)
	}
	if mtu, ok := plugins[0]["mtu"]; ok {
		if got := one.sh(server, "cat /sys/class/net/eth0/mtu"); got != fmt.Sprint(mtu) {
			t.Errorf("MTU = %s; want %v", got, mtu)
		}
	}
	if mapped {
		if got := fetch(t, e, url(addressOfHost(t, e), 18080)); got != "one" {
			t.Errorf("host port gives %q; want one", got)
		}
		exchange(t, "pod to another host", at("192.0.2.2", probePort), two.probeIn(client))
		exchange(t, "another host to a port of the host", at("192.0.2.1", 17000), outside)
	}
	if t.Failed() {
		t.Logf("pod one: %s", one.sh(server, counters))
		t.Logf("pod two: %s", two.sh(client, counters))
	}
}

// counters shows where packets were lost.
const counters = "cat /proc/net/dev /proc/net/snmp /proc/net/softnet_stat; grep -E '^(Ip|Tcp)Ext' /proc/net/netstat; free"

// gateways returns the host's addresses on the pod's network.
func (p *pod) gateways(id string, plugins []env.Object) []string {
	p.t.Helper()
	if plugins[0]["type"] == "macvlan" {
		return []string{"10.93.255.1", "fd00:93::ffff"}
	}
	out := strings.Fields(p.sh(id, "for f in -4 -6; do ip $f route | awk '/^default/ { print $3; exit }'; done"))
	if len(out) != 2 {
		p.t.Errorf("gateways of the pod = %q; want one of each family", out)
	}
	return out
}

// awaitListener returns once a TCP port is listened on in the pod.
func (p *pod) awaitListener(id string, port int) {
	p.t.Helper()
	p.sh(id, fmt.Sprintf("i=0; until cat /proc/net/tcp /proc/net/tcp6 | grep -q ':%04X .* 0A '; do i=$((i+1)); [ $i -lt 100 ] || exit 1; sleep 0.1; done", port))
}

// addressOfHost returns an address of the environment that is not loopback.
func addressOfHost(t *testing.T, e *env.Env) string {
	t.Helper()
	out, err := e.Command(env.Context(t), "sh", "-c", "ip -4 -o addr show dev test1 | sed 's/.*inet \\([0-9.]*\\).*/\\1/'").Run()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// TestPortForward reaches servers that listen on the pod's loopback alone.
func TestPortForward(t *testing.T) {
	inModes(t, func(t *testing.T, e *env.Env) {
		p := runPod(t, e, "pod", nil)
		v4 := p.run("v4", "mkdir /srv; echo four > /srv/index.html; exec httpd -f -p 127.0.0.1:8080 -h /srv")
		v6 := p.run("v6", "mkdir /srv; echo six > /srv/index.html; exec httpd -f -p '[::1]:8081' -h /srv")
		// crictl gives up on the first connection that fails.
		p.awaitListener(v4, 8080)
		p.awaitListener(v6, 8081)
		forward := e.Crictl(env.Context(t), "port-forward", p.ID, "18080:8080", "18081:8081")
		if err := forward.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			forward.Cancel()
			forward.Wait()
		}()
		if got := fetch(t, e, "http://127.0.0.1:18080/"); got != "four" {
			t.Errorf("port-forward to 127.0.0.1 = %q; want four", got)
		}
		if got := fetch(t, e, "http://127.0.0.1:18081/"); got != "six" {
			t.Errorf("port-forward to ::1 = %q; want six", got)
		}
	})
}
