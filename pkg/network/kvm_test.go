//go:build linux

package network_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/vmrt/vmrt/pkg/vsock"
	"github.com/vmrt/vmrt/tests/platform"
	"github.com/vmrt/vmrt/tests/probe"
)

// TestKVMNetwork has the kernel serve the virtual machine's devices, as it does
// where there is vhost-net. `make test-kvm` runs it in the nested machine; what
// it sends is little, since each byte is copied by an emulated processor.
func TestKVMNetwork(t *testing.T) {
	vmTest(t)
	for _, dev := range []string{"/dev/kvm", "/dev/vhost-vsock", "/dev/vhost-net"} {
		if _, err := os.Stat(dev); err != nil {
			if platform.Lab() {
				t.Fatal(err)
			}
			t.Skipf("needs %s: run `make test-kvm`", dev)
		}
	}
	out, pod := newNetNS(t), newNetNS(t)
	bridges(out)
	attach(pod, out, "eth0", 0, 2)
	const cpus, devices = 2, 2
	m := boot(t, pod, machineSpec{vsock: vsock.Vhost, cpus: cpus, spares: devices - 1})
	h := hostEnd(out)
	for _, e := range []end{h, m} {
		if err := e.Serve(); err != nil {
			t.Fatal(err)
		}
	}
	// The kernel has a worker for each queue, and one for vsock.
	if got, want := len(vhostWorkers(t, m.vmm)), devices*cpus+1; got != want {
		t.Errorf("%d workers of vhost; want %d", got, want)
	}
	if got := strings.Count(m.run("ls /sys/class/net/eth0/queues"), "tx-"); got != cpus {
		t.Errorf("eth0 has %d queues for %d CPUs; want as many", got, cpus)
	}
	testBriefly(t, m, h, "10.1.0.1")
	testBriefly(t, h, m, "10.1.0.2")
	testBriefly(t, h, m, "fd00:1::2")
	testVhostQueues(t, m, h, "10.1.0.2", cpus)

	attach(pod, out, "net1", 1, 2)
	if err := m.net.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	m.configure(t.Context())
	testBriefly(t, h, m, "10.2.0.2")
	testBriefly(t, m, h, "fd00:2::1")
	testVhostQueues(t, m, h, "10.2.0.2", cpus)
	if t.Failed() {
		t.Logf("the guest's counters:\n%s%s", m.run("cat /proc/net/snmp"), m.run("cat /proc/net/dev"))
	}
}

// testVhostQueues sends from the host to one device of the guest until a worker
// for each of its queues has had something to do: the tap chooses one by the
// flow.
func testVhostQueues(t *testing.T, m *machine, from end, ip string, queues int) {
	t.Helper()
	const flows = 32 // the chance that all take one queue is 2^-31
	streams := vsockWorker(t, m)
	before := vhostWorkers(t, m.vmm)
	var busy []int
	for range flows {
		x := probe.Exchange{Network: "tcp", Addr: addr(ip), Size: 1000, Count: 1}
		if _, err := from.RoundTrips(x); err != nil {
			t.Errorf("round trip: %v", err)
			return
		}
		busy = nil
		for id, switches := range vhostWorkers(t, m.vmm) {
			if switches > before[id] && id != streams {
				busy = append(busy, id)
			}
		}
		if len(busy) >= queues {
			return
		}
	}
	t.Errorf("workers %v of %v were busy with %d connections to %s; want one for each of %d queues",
		busy, slices.Sorted(maps.Keys(before)), flows, ip, queues)
}

// vsockWorker returns the worker that has the most to do when nothing is sent
// but requests to the probe.
func vsockWorker(t *testing.T, m *machine) (worker int) {
	t.Helper()
	before := vhostWorkers(t, m.vmm)
	for range 10 {
		m.run("true")
	}
	most := 0
	for id, switches := range vhostWorkers(t, m.vmm) {
		if n := switches - before[id]; n > most {
			worker, most = id, n
		}
	}
	return worker
}

// vhostWorkers returns how often each worker of vhost's that serves a VMM has
// gone to sleep. They bear the VMM's number, and are kernel threads or, since
// Linux 6.4, threads of the VMM.
func vhostWorkers(t *testing.T, vmm int) map[int]int {
	t.Helper()
	found := make(map[int]int)
	for _, pattern := range []string{"/proc/[0-9]*/comm", fmt.Sprintf("/proc/%d/task/*/comm", vmm)} {
		names, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			comm, err := os.ReadFile(name)
			if errors.Is(err, os.ErrNotExist) || strings.TrimSpace(string(comm)) != fmt.Sprintf("vhost-%d", vmm) {
				continue // others come and go
			}
			dir := filepath.Dir(name)
			id, err := strconv.Atoi(filepath.Base(dir))
			if err != nil {
				t.Fatal(err)
			}
			found[id] = switches(t, filepath.Join(dir, "status"))
		}
	}
	return found
}

// switches reads how often a thread has gone to sleep.
func switches(t *testing.T, status string) int {
	t.Helper()
	text, err := os.ReadFile(status)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "voluntary_ctxt_switches:"); ok {
			n, err := strconv.Atoi(strings.TrimSpace(value))
			if err != nil {
				t.Fatalf("%s: %v", status, err)
			}
			return n
		}
	}
	t.Fatalf("%s: no voluntary_ctxt_switches in\n%s", status, text)
	return 0
}
