package shim

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmrt/vmrt/api/cri"
	"github.com/vmrt/vmrt/pkg/idmap"
)

// sandboxSpec is what CRI writes for a pod's container.
func sandboxSpec(namespaces ...specs.LinuxNamespace) *specs.Spec {
	return &specs.Spec{
		Hostname:    "web-0",
		Annotations: map[string]string{annotationContainerType: containerTypeSandbox, annotationMemory: "1024"},
		Linux:       &specs.Linux{CgroupsPath: "/pod/1", Namespaces: namespaces, Sysctl: map[string]string{"net.core.somaxconn": "99"}},
		Mounts:      []specs.Mount{{Destination: "/dev/shm", Type: "bind", Source: missingShm}},
	}
}

const missingShm = "/no/such/shm"

func TestPodOfSpec(t *testing.T) {
	all := []specs.LinuxNamespace{{Type: "pid"}, {Type: "ipc"}, {Type: "uts"}, {Type: "mount"}, {Type: "network", Path: "/run/netns/x"}}
	p, err := podOfSpec(sandboxSpec(all...))
	if err != nil {
		t.Fatal(err)
	}
	if p.netns != "/run/netns/x" || p.cgroupsPath != "/pod/1" || p.limits.memory != 1024 || p.shm != missingShm {
		t.Errorf("podOfSpec = %+v", p)
	}
	if o := p.open; o.Hostname != "web-0" || !o.Pid || o.ShmBytes != podShmBytes || o.Sysctls["net.core.somaxconn"] != "99" {
		t.Errorf("what containers share = %+v", o)
	}
	for kind, want := range map[string]string{"ipc": "/run/vmrt/pod/ns/ipc", "uts": "/run/vmrt/pod/ns/uts", "pid": "/run/vmrt/pod/ns/pid"} {
		if got := p.namespace(kind); got != want {
			t.Errorf("namespace(%s) = %s; want %s", kind, got, want)
		}
	}

	// hostPID and hostIPC mean the virtual machine's.
	p, err = podOfSpec(sandboxSpec(specs.LinuxNamespace{Type: "network"}, specs.LinuxNamespace{Type: "uts"}))
	if err != nil {
		t.Fatal(err)
	}
	if p.open.Pid || p.open.ShmBytes != 0 || p.shm != "" {
		t.Errorf("pod without pid and ipc namespaces = %+v, shm %q; want none of its own", p.open, p.shm)
	}
	for _, kind := range []string{"ipc", "pid"} {
		if got, want := p.namespace(kind), "/proc/1/ns/"+kind; got != want {
			t.Errorf("namespace(%s) = %s; want %s", kind, got, want)
		}
	}

	// So does hostNetwork mean the host's.
	if p.hostNetwork {
		t.Error("pod with a network namespace has the host's network")
	}
	host := sandboxSpec()
	host.Linux.Sysctl = nil
	if p, err = podOfSpec(host); err != nil || !p.hostNetwork || p.late {
		t.Errorf("pod without a network namespace = %+v, %v; want one with the host's", p, err)
	}
	host.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1"}
	if p, err = podOfSpec(host); !errdefs.IsInvalidArgument(err) {
		t.Errorf("pod without a network namespace that sets one of its sysctls = %+v, %v; want an invalid argument", p, err)
	}
	user := sandboxSpec(append(all, specs.LinuxNamespace{Type: "user", Path: "/run/pinned/user"})...)
	user.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 1000, Size: 10}}
	user.Linux.GIDMappings = []specs.LinuxIDMapping{{HostID: 2000, Size: 10}}
	if p, err = podOfSpec(user); err != nil || !p.ids.Equal(idmap.Mapping{UIDs: user.Linux.UIDMappings, GIDs: user.Linux.GIDMappings}) {
		t.Errorf("pod with a user namespace = %+v, %v", p, err)
	}
	user.Linux.GIDMappings = nil
	if p, err = podOfSpec(user); !errdefs.IsInvalidArgument(err) {
		t.Errorf("pod with a user namespace without groups = %+v, %v; want an invalid argument", p, err)
	}
}

func TestPodUserNamespace(t *testing.T) {
	ids := []*cri.IDMapping{{HostId: 1000, Length: 10}}
	for _, tt := range []struct {
		name    string
		options *cri.UserNamespace
		want    string // the uids
		err     string
	}{
		{"not asked for", nil, "", ""},
		{"the host's", &cri.UserNamespace{Mode: cri.NamespaceMode_NODE, Uids: ids, Gids: ids}, "", ""},
		{"the pod's", &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: ids, Gids: ids}, "0:1000:10", ""},
		{"no ids", &cri.UserNamespace{Mode: cri.NamespaceMode_POD}, "", "no uid mappings found"},
		{"a container's", &cri.UserNamespace{Mode: cri.NamespaceMode_CONTAINER, Uids: ids, Gids: ids}, "", "mode CONTAINER: want POD or NODE"},
		{"another's", &cri.UserNamespace{Mode: cri.NamespaceMode_TARGET, Uids: ids, Gids: ids}, "", "mode TARGET: want POD or NODE"},
	} {
		got, err := criIDs(tt.options)
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%s: %v; want %q", tt.name, err, tt.err)
			}
			continue
		}
		if err != nil || idmap.Format(got.UIDs) != tt.want {
			t.Errorf("%s = %v, %v; want uids %q", tt.name, got, err, tt.want)
		}
	}
}

func TestResolvConf(t *testing.T) {
	got := resolvConf(&cri.DNSConfig{Servers: []string{"192.0.2.1", "2001:db8::1"}, Searches: []string{"a", "b"}, Options: []string{"ndots:5", "edns0"}})
	want := "search a b\nnameserver 192.0.2.1\nnameserver 2001:db8::1\noptions ndots:5 edns0\n"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("resolv.conf (-want +got):\n%s", diff)
	}
}

func TestCRICgroup(t *testing.T) {
	for parent, want := range map[string]string{
		"":                                    "",
		"/kubepods/pod1":                      "/kubepods/pod1/id",
		"/kubepods.slice/kubepods-pod1.slice": "kubepods-pod1.slice:cri-containerd:id",
	} {
		if got := criCgroup(parent, "id"); got != want {
			t.Errorf("criCgroup(%q) = %q; want %q", parent, got, want)
		}
	}
}

func TestAddMounts(t *testing.T) {
	b, err := proto.Marshal(&cri.PodSandboxConfig{Hostname: "web-0"})
	if err != nil {
		t.Fatal(err)
	}
	p, err := podOfCRI("id", "", &anypb.Any{TypeUrl: "type.googleapis.com/runtime.v1.PodSandboxConfig", Value: b})
	if err != nil {
		t.Fatal(err)
	}
	shm := specs.Mount{Destination: "/dev/shm", Type: "tmpfs"}
	for _, tt := range []struct {
		name, ipc string
		shm       specs.Mount
	}{
		{"shares memory", "/proc/42/ns/ipc", specs.Mount{Destination: "/dev/shm", Type: "bind", Source: podShmSource, Options: []string{"rbind", "rprivate", "rw"}}},
		{"has its own", "", shm},
	} {
		spec := &specs.Spec{
			Root:   &specs.Root{Readonly: true},
			Mounts: []specs.Mount{shm, {Destination: "/etc/hosts", Type: "bind", Source: "/kubelet/hosts"}},
			Linux:  &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.IPCNamespace, Path: tt.ipc}}},
		}
		p.addMounts(spec, "/files")
		want := []specs.Mount{
			tt.shm,
			{Destination: "/etc/hosts", Type: "bind", Source: "/kubelet/hosts"},
			{Destination: "/etc/hostname", Type: "bind", Source: "/files/hostname", Options: []string{"rbind", "rprivate", "ro"}},
			{Destination: "/etc/resolv.conf", Type: "bind", Source: "/files/resolv.conf", Options: []string{"rbind", "rprivate", "ro"}},
		}
		if diff := cmp.Diff(want, spec.Mounts); diff != "" {
			t.Errorf("mounts of a container that %s (-want +got):\n%s", tt.name, diff)
		}
	}
}
