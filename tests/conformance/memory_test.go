package conformance

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
)

// shimMemoryLimit is the private memory of a shim with one pod, alone on its
// host, in KiB: well below the budget of 14 MB, so that what grows is seen in
// time.
const shimMemoryLimit = 8 << 10

func TestShimMemory(t *testing.T) {
	s := newShim(t, args("sleep", "1000"))
	s.mustCreate(nil, false)
	s.mustStart("")
	for i := range 5 {
		s.exec(fmt.Sprintf("e%d", i), "true")
	}
	s.checkMemory()
}

// The same with streams instead of FIFOs.
func TestShimMemoryStreaming(t *testing.T) {
	s := newShim(t, args("cat"))
	st, in := s.newServedStreams(s.id, true, false)
	s.mustCreate(st, false)
	s.mustStart("")
	for i := range 5 {
		id := fmt.Sprintf("e%d", i)
		st, _ := s.newServedStreams(id, false, false)
		s.mustExec(id, st, false, "echo", "text")
		s.wait(id)
		s.delete(id)
	}
	fmt.Fprintln(in, "text")
	st.out.waitFor(t, "text")
	s.checkMemory()
}

// checkMemory waits for the shim to give back what its requests have used.
func (s *shim) checkMemory() {
	s.t.Helper()
	c, err := s.task.Connect(s.call(), &taskapi.ConnectRequest{ID: s.id})
	if err != nil {
		s.t.Fatal(err)
	}
	private := privateKiB(s.t, int(c.ShimPid))
	s.t.Logf("shim: %d KiB private, just after its requests", private)
	deadline := time.Now().Add(40 * time.Second)
	for ; private > shimMemoryLimit && time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		private = privateKiB(s.t, int(c.ShimPid))
	}
	s.t.Logf("shim: %d KiB private", private)
	if private > shimMemoryLimit {
		s.t.Errorf("shim has %d KiB of private memory; want at most %d", private, shimMemoryLimit)
	}
}

// privateKiB is what a process does not share with any other, less the guest
// memory that it maps.
func privateKiB(t testing.TB, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	total := 0
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if strings.HasPrefix(line, "Private_") {
			kib, err := strconv.Atoi(fields[1])
			if err != nil {
				t.Fatal(err)
			}
			total += kib
		}
	}
	return total
}
