package cri

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
)

// usernsBase is the host's id of a pod's root.
const usernsBase = 100000

// usernsOptions are those of a pod of hostUsers: false, and of its containers.
func usernsOptions() env.Object {
	ids := []env.Object{{"container_id": 0, "host_id": usernsBase, "length": 65536}}
	return env.Object{"namespace_options": env.Object{"userns_options": env.Object{"mode": 0, "uids": ids, "gids": ids}}}
}

// usernsSteps show what a pod's root is, and what it may do: what belongs to
// the pod is its own, as are its namespaces.
var usernsSteps = []string{
	"cat /proc/self/uid_map /proc/self/gid_map",
	"id",
	"stat -c '%n %u:%g' / /bin /etc/hosts /etc/hostname /etc/resolv.conf /mapped /mapped/file /plain",
	"echo 127.0.0.9 mine >> /etc/hosts && tail -n 1 /etc/hosts",
	"touch /dev/shm/here && echo shared memory is writable",
	"echo changed > /mapped/file && touch /mapped/made && chown 5:6 /mapped/made && stat -c '%n %u:%g' /mapped/made",
	"touch /plain/made 2>/dev/null || echo a folder of the host is not",
	"echo $(cat /proc/sys/net/ipv4/ip_local_port_range /proc/sys/kernel/shm_rmid_forced)",
	// Ports below 1024, with the power over the network that root has.
	"httpd -p 80 -h /bin && printf 'GET /none HTTP/1.0\\r\\n\\r\\n' | nc -w 5 127.0.0.1 80 | head -n 1",
	"ping -c 1 -W 5 127.0.0.1 2>&1 | grep received",
	"ip link set lo mtu 60000 && cat /sys/class/net/lo/mtu; ls /sys/class/net | grep -x -e lo -e eth0",
	"hostname other 2>/dev/null || echo not the host name without CAP_SYS_ADMIN; hostname",
	"ps -o user,args | grep -c '/pause$'",
	"kill -0 1 && echo pause can be signalled",
	"su -s /bin/sh www-data -c id",
}

// TestUserNamespaces: a pod of hostUsers: false does what it does with runc.
func TestUserNamespaces(t *testing.T) {
	inModes(t, func(t *testing.T, e *env.Env) {
		var said [2][]string
		for i, runtime := range []string{"runc", "vmrt"} {
			said[i] = usernsPod(t, e, runtime)
		}
		if diff := cmp.Diff(said[0], said[1]); diff != "" {
			t.Errorf("runc (-) and vmrt (+) differ:\n%s", diff)
		}
		usernsHostNetwork(t, e)
		usernsErrors(t, e)
	})
}

// usernsPod returns what the steps say in a pod of a runtime.
func usernsPod(t *testing.T, e *env.Env, runtime string) (said []string) {
	config := env.Object{
		"hostname": "h",
		"linux": env.Object{
			"security_context": usernsOptions(),
			"sysctls":          env.Object{"net.ipv4.ip_local_port_range": "2000 3000", "kernel.shm_rmid_forced": "1"},
		},
	}
	p := &pod{t: t, e: e, ctx: env.Context(t)}
	var err error
	if p.Pod, err = e.RunPodOn(p.ctx, runtime, "userns-"+runtime, config); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Remove(p.ctx); err != nil {
			t.Error(err)
		}
	}()
	mapped, plain := t.TempDir(), t.TempDir()
	file := filepath.Join(mapped, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	ids := []env.Object{{"container_id": 0, "host_id": usernsBase, "length": 65536}}
	container := env.Object{
		"command": []string{"sleep", "1000"},
		"linux":   env.Object{"security_context": usernsOptions()},
		"mounts": []env.Object{
			{"container_path": "/mapped", "host_path": mapped, "uidMappings": ids, "gidMappings": ids},
			{"container_path": "/plain", "host_path": plain},
		},
	}
	security := container["linux"].(env.Object)["security_context"].(env.Object)
	security["capabilities"] = env.Object{"add_capabilities": []string{"NET_ADMIN"}}
	id, err := p.Pod.Run(p.ctx, "one", image.BusyboxName, container)
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range usernsSteps {
		said = append(said, p.sh(id, step))
	}
	owner := func(path string) string {
		var st syscall.Stat_t
		if err := syscall.Stat(path, &st); err != nil {
			t.Error(err)
		}
		return fmt.Sprintf("%s is %d:%d's", filepath.Base(path), st.Uid, st.Gid)
	}
	said = append(said, owner(file), owner(filepath.Join(mapped, "made")))

	p.sh(id, "mkdir /www; echo from the pod > /www/index.html; httpd -p 8888 -h /www")
	for _, ip := range p.ips() {
		said = append(said, fetch(t, e, url(ip, 8888)))
	}
	portForward(t, p)

	// A second container, of another user, is in the same namespaces; and a
	// container can be made again in a living pod.
	delete(security, "capabilities")
	security["run_as_user"] = env.Object{"value": 1002}
	for _, name := range []string{"two", "three"} {
		container["command"] = []string{"sh", "-c", "id; cat /proc/self/uid_map; ls /dev/shm; echo reopened > /dev/stdout; touch /tmp/x && stat -c '%u:%g' /tmp/x; cat /proc/sys/kernel/shm_rmid_forced"}
		id, err := p.Pod.Run(p.ctx, name, image.BusyboxName, container)
		if err != nil {
			t.Fatal(err)
		}
		p.awaitExit(id)
		said = append(said, p.logged(name))
	}
	return said
}

// usernsHostNetwork: the two go together.
func usernsHostNetwork(t *testing.T, e *env.Env) {
	addCard(t, e, "card0", "10.6.0.1/24")
	both := usernsOptions()
	both["namespace_options"].(env.Object)["network"] = 2
	p := runPod(t, e, "userns-hostnet", env.Object{"linux": env.Object{"security_context": both}})
	id, err := p.Pod.Run(p.ctx, "web", image.BusyboxName, env.Object{
		"command": []string{"sh", "-c", webServer}, "linux": env.Object{"security_context": both},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{"127.0.0.1:8888", "10.6.0.1:8888"} {
		await(t, e, address, says("from the pod"))
	}
	if got := strings.Fields(p.sh(id, "cat /proc/self/uid_map")); strings.Join(got, " ") != fmt.Sprint("0 ", usernsBase, " 65536") {
		t.Errorf("ids of a pod with the host's network = %v; want its own", got)
	}
}

// usernsErrors: what cannot be is refused, and leaves nothing.
func usernsErrors(t *testing.T, e *env.Env) {
	p := runPod(t, e, "plain", nil)
	_, err := p.Pod.Run(p.ctx, "other", image.BusyboxName, env.Object{
		"command": []string{"true"}, "linux": env.Object{"security_context": usernsOptions()},
	})
	if err == nil || !strings.Contains(err.Error(), "user") {
		t.Errorf("container with a user namespace in a pod without = %v; want an error about it", err)
	}
	// Most are containerd's own errors; pods with the host's network, for which it
	// makes no network namespace, reach the runtime with more of them.
	for name, options := range map[string]env.Object{
		"no ids":             {"mode": 0},
		"container's":        {"mode": 1},
		"another's":          {"mode": 3},
		"not mapping root":   {"mode": 0, "uids": []env.Object{{"container_id": 1, "host_id": 5, "length": 9}}, "gids": []env.Object{{"container_id": 1, "host_id": 5, "length": 9}}},
		"mapping no ids":     {"mode": 0, "uids": []env.Object{{"host_id": 5}}, "gids": []env.Object{{"host_id": 5}}},
		"mapping uids alone": {"mode": 0, "uids": []env.Object{{"host_id": 5, "length": 9}}},
	} {
		bad, err := e.RunPod(p.ctx, "bad", env.Object{"linux": env.Object{"security_context": env.Object{"namespace_options": env.Object{"userns_options": options}}}})
		if err == nil {
			t.Errorf("pod with a user namespace %s was made", name)
			if err := bad.Remove(p.ctx); err != nil {
				t.Error(err)
			}
		}
	}
	if left, err := filepath.Glob(e.Path("/run/vmrt/k8s.io/*")); err != nil || len(left) != 2 {
		t.Errorf("refused pods have left %v, %v; want the folders of the two pods that run", left, err)
	}
}
