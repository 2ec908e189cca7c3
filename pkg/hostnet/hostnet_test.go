//go:build linux

package hostnet_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/hostnet"
	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/podns/podnstest"
)

const patience = 20 * time.Second

func TestMain(m *testing.M) { podnstest.Main(m, nil) }

// host is a network namespace that stands for the host's.
func host(t *testing.T, commands ...string) *podns.Namespaces {
	t.Helper()
	ns := podnstest.Open(t, podns.Config{})
	for _, c := range commands {
		err := ns.Do(t.Context(), func() error {
			if out, err := exec.Command("ip", strings.Fields(c)...).CombinedOutput(); err != nil {
				return fmt.Errorf("ip %s: %w: %s", c, err, out)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return ns
}

func find(t *testing.T, ns *podns.Namespaces) (found *hostnet.Template) {
	t.Helper()
	err := ns.Do(t.Context(), func() (err error) {
		found, err = hostnet.Find()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

const (
	mac0 = "02:00:00:00:00:10"
	mac1 = "02:00:00:00:00:11"
)

// card makes an interface that has a carrier.
func card(name, mac string, addresses ...string) []string {
	c := []string{"link add " + name + " address " + mac + " mtu 1400 type veth peer name peer-" + name, "link set peer-" + name + " up", "link set " + name + " up"}
	for _, a := range addresses {
		c = append(c, "addr add "+a+" dev "+name+" nodad")
	}
	return c
}

func TestFind(t *testing.T) {
	for name, tc := range map[string]struct {
		commands []string
		want     hostnet.Template
	}{
		"loopback alone":         {nil, hostnet.Template{}},
		"interface that is down": {[]string{"link add eth0 type veth", "addr add 192.0.2.2/24 dev eth0"}, hostnet.Template{}},
		"without addresses":      {card("eth0", mac0), hostnet.Template{}},
		"default route": {
			append(card("eth0", mac0, "192.0.2.2/24", "2001:db8::2/64"), "route add default via 192.0.2.1", "route add default via fe80::9 dev eth0"),
			hostnet.Template{
				Interface: "eth0", MTU: 1400, IPv4: netip.MustParsePrefix("192.0.2.2/24"), IPv6: netip.MustParsePrefix("2001:db8::2/64"),
				Gateway4: netip.MustParseAddr("192.0.2.1"), Gateway6: netip.MustParseAddr("fe80::9"),
			},
		},
		"the best of two": {
			append(append(card("eth0", mac1, "192.0.2.2/24"), card("eth1", mac0, "198.51.100.2/24")...),
				"route add default via 192.0.2.1 metric 200", "route add default via 198.51.100.1 metric 100"),
			hostnet.Template{
				Interface: "eth1", MTU: 1400, IPv4: netip.MustParsePrefix("198.51.100.2/24"), Gateway4: netip.MustParseAddr("198.51.100.1"),
			},
		},
		"preferred source": {
			append(card("eth0", mac0, "192.0.2.2/24", "192.0.2.3/24"), "route add default via 192.0.2.1 src 192.0.2.3"),
			hostnet.Template{
				Interface: "eth0", MTU: 1400, IPv4: netip.MustParsePrefix("192.0.2.3/24"), Gateway4: netip.MustParseAddr("192.0.2.1"),
			},
		},
		"no default route": {
			append(card("eth0", mac0, "192.0.2.2/24", "2001:db8::2/64"), card("eth1", mac1, "198.51.100.2/24")...),
			hostnet.Template{
				Interface: "eth0", MTU: 1400, IPv4: netip.MustParsePrefix("192.0.2.2/24"), IPv6: netip.MustParsePrefix("2001:db8::2/64"),
				Gateway4: netip.MustParseAddr("169.254.2.1"), Gateway6: netip.MustParseAddr("fe80::1"),
			},
		},
		"default route without a gateway": {
			append(card("eth0", mac0, "192.0.2.2/32"), "route add default dev eth0"),
			hostnet.Template{
				Interface: "eth0", MTU: 1400, IPv4: netip.MustParsePrefix("192.0.2.2/32"), Gateway4: netip.MustParseAddr("169.254.2.1"),
			},
		},
		"IPv6 alone, and passing addresses": {
			append(card("eth0", mac0), "addr add 2001:db8::5/64 dev eth0 nodad preferred_lft 0", "addr add 2001:db8::6/64 dev eth0 nodad"),
			hostnet.Template{
				Interface: "eth0", MTU: 1400, IPv6: netip.MustParsePrefix("2001:db8::6/64"), Gateway6: netip.MustParseAddr("fe80::1"),
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.want.Interface != "" {
				tc.want.MAC, _ = net.ParseMAC(mac0)
			}
			got := find(t, host(t, tc.commands...))
			if diff := cmp.Diff(&tc.want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
				cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
				t.Errorf("Find() (-want +got):\n%s", diff)
			}
		})
	}
}

func TestRequest(t *testing.T) {
	if got := (&hostnet.Template{}).Request(); len(got.Interfaces)+len(got.Routes) != 0 {
		t.Errorf("Request() of loopback alone = %v; want nothing", got)
	}
	template := &hostnet.Template{
		Interface: "ens3", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 0x10}, MTU: 1400,
		IPv4: netip.MustParsePrefix("192.0.2.2/24"), Gateway4: netip.MustParseAddr("192.0.2.1"),
	}
	want := &api.NetworkConfig{
		Interfaces: []*api.NetworkInterface{{
			Device: mac0, Name: "ens3", Mac: mac0, Mtu: 1400, DisableIpv6: true,
			Addresses: []*api.NetworkAddress{{Prefix: "192.0.2.2/24"}},
		}},
		Routes: []*api.NetworkRoute{{
			Destination: "0.0.0.0/0", Type: 1, Protocol: 4, Table: 254,
			Hops: []*api.NetworkHop{{Interface: "ens3", Gateway: "192.0.2.1", Onlink: true, Weight: 1}},
		}},
	}
	if diff := cmp.Diff(want, template.Request(), protocmp.Transform()); diff != "" {
		t.Errorf("Request() (-want +got):\n%s", diff)
	}
	for ip, want := range map[string]bool{"192.0.2.2": true, "192.0.2.1": false, "127.0.0.8": true, "::1": true, "2001:db8::2": false} {
		if got := template.Has(netip.MustParseAddr(ip)); got != want {
			t.Errorf("Has(%s) = %v; want %v", ip, got, want)
		}
	}
}

// passt returns its path, or skips the test.
func passt(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("passt")
	if err != nil {
		t.Skip("needs passt: install the package passt")
	}
	return path
}

// start runs a passt for a namespace with one interface of both families.
func start(t *testing.T) (*podns.Namespaces, *hostnet.Passt) {
	t.Helper()
	ns := host(t, card("eth0", mac0, "192.0.2.2/24", "2001:db8::2/64")...)
	p, err := hostnet.StartPasst(t.Context(), ns, hostnet.PasstConfig{
		Binary: passt(t), Credential: &syscall.Credential{Uid: 0x70000001, Gid: 0x70000001}, Template: find(t, ns),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return ns, p
}

// arp is a guest's question for who has an address.
func arp(mac net.HardwareAddr, from, to netip.Addr) []byte {
	b := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	b = append(append(b, mac...), 8, 6, 0, 1, 8, 0, 6, 4, 0, 1)
	b = append(append(b, mac...), from.AsSlice()...)
	return append(append(b, 0, 0, 0, 0, 0, 0), to.AsSlice()...)
}

// TestPasst: it is there for whatever the guest asks, under a hardware address
// that is not the guest's.
func TestPasst(t *testing.T) {
	_, p := start(t)
	stream, err := net.FileConn(p.NIC().Stream)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	stream.SetDeadline(time.Now().Add(patience))
	mac, _ := net.ParseMAC(p.NIC().MAC)
	for _, ip := range []string{"192.0.2.1", "169.254.2.1"} {
		frame := arp(mac, netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr(ip))
		if _, err := stream.Write(append(binary32(len(frame)), frame...)); err != nil {
			t.Fatalf("%v (%v)", err, p.Err())
		}
		answer, err := readFrame(stream)
		if err != nil {
			t.Fatalf("answer of passt: %v (%v)", err, p.Err())
		}
		if len(answer) < 42 || answer[21] != 2 || net.IP(answer[28:32]).String() != ip {
			t.Errorf("who has %s: %x; want an answer", ip, answer)
		} else if sender := net.HardwareAddr(answer[22:28]); sender.String() == mac.String() {
			t.Errorf("%s is at %s, which is the guest's own address", ip, sender)
		}
	}
	p.ReleaseFile()
	stream.Close()
	// It ends with the VMM.
	podnstest.Receive(t, "the end of passt", p.Done())
	if err := p.Err(); err != nil {
		t.Errorf("Err() after the VMM's end = %v; want nil", err)
	}
}

func binary32(n int) []byte { return binary.BigEndian.AppendUint32(nil, uint32(n)) }

func readFrame(r io.Reader) ([]byte, error) {
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	frame := make([]byte, min(binary.BigEndian.Uint32(size[:]), 1<<16))
	_, err := io.ReadFull(r, frame)
	return frame, err
}

func TestPasstEnds(t *testing.T) {
	t.Run("killed", func(t *testing.T) {
		_, p := start(t)
		if err := syscall.Kill(p.Pid(), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		podnstest.Receive(t, "the end of passt", p.Done())
		if err := p.Err(); err == nil || !strings.HasPrefix(err.Error(), "passt: killed") {
			t.Errorf("Err() of a passt that was killed = %v; want that", err)
		}
	})
	t.Run("pod is closed", func(t *testing.T) {
		ns, p := start(t)
		p.ReleaseFile() // as the VMM, which ends as well
		ns.Close()
		podnstest.Receive(t, "the end of passt", p.Done())
	})
	t.Run("bad interface", func(t *testing.T) {
		ns := host(t, card("eth0", mac0, "192.0.2.2/24")...)
		template := find(t, ns)
		template.Interface = "none"
		p, err := hostnet.StartPasst(t.Context(), ns, hostnet.PasstConfig{Binary: passt(t), Template: template})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		podnstest.Receive(t, "the end of passt", p.Done())
		if err := p.Err(); err == nil || !strings.HasPrefix(err.Error(), "passt: exit status 1: ") {
			t.Errorf("Err() = %v; want passt's own words", err)
		}
	})
	t.Run("missing", func(t *testing.T) {
		ns := host(t, card("eth0", mac0, "192.0.2.2/24")...)
		_, err := hostnet.StartPasst(t.Context(), ns, hostnet.PasstConfig{Binary: "/nonexistent/passt", Template: find(t, ns)})
		if !errors.Is(err, hostnet.ErrNoPasst) {
			t.Errorf("StartPasst() of a file that is not there = %v; want %v", err, hostnet.ErrNoPasst)
		}
	})
}

// passt has neither the host's files nor its root user nor all system calls.
func TestPasstIsConfined(t *testing.T) {
	_, p := start(t)
	dir := fmt.Sprintf("/proc/%d/", p.Pid())
	podnstest.Wait(t, "passt to confine itself", func() bool {
		status, err := os.ReadFile(dir + "status")
		return err == nil && strings.Contains(string(status), "Seccomp:\t2")
	})
	if entries, err := os.ReadDir(dir + "root"); err != nil || len(entries) != 0 {
		t.Errorf("root of passt has %v, %v; want nothing", entries, err)
	}
	status, err := os.ReadFile(dir + "status")
	if err != nil || !strings.Contains(string(status), "Uid:\t1879048193\t1879048193\t1879048193") {
		t.Errorf("status of passt, %v:\n%s\nwant the user that it was given", err, status)
	}
}
