package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// procStatus returns fields of /proc/<pid>/status.
func procStatus(t *testing.T, pid int) map[string]string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(line, ":")
		fields[key] = strings.Join(strings.Fields(value), " ")
	}
	return fields
}

// children returns the processes that a process has forked.
func children(t *testing.T, pid int) (pids []int) {
	t.Helper()
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // a thread that has ended
		}
		for _, field := range strings.Fields(string(b)) {
			child, err := strconv.Atoi(field)
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, child)
		}
	}
	return pids
}

// apart wants a process to be in namespaces of its own.
func apart(t *testing.T, pid int, kinds ...string) {
	t.Helper()
	for _, kind := range kinds {
		own, err := os.Readlink("/proc/self/ns/" + kind)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind)); err != nil || got == own {
			t.Errorf("%s namespace of %d = %s, %v; the host's is %s", kind, pid, got, err, own)
		}
	}
}

// TestHostSideIsConfined is about a guest that has taken over what serves it:
// QEMU can do next to nothing on the host, and reach no other pod's; virtiofsd
// sees what the pod was given, and no more.
func TestHostSideIsConfined(t *testing.T) {
	s := newShim(t, args("sleep", "1000"))
	s.mustCreate(nil, false)
	s.mustStart("")
	other := newShim(t, args("sleep", "1000"))
	other.mustCreate(nil, false)
	other.mustStart("")

	vm := s.findVM()
	st := procStatus(t, vm)
	uid, _, _ := strings.Cut(st["Uid"], " ")
	if n, err := strconv.Atoi(uid); err != nil || n < 0x70000000 || st["Uid"] != strings.Repeat(uid+" ", 3)+uid || st["Gid"] != st["Uid"] {
		t.Errorf("QEMU runs as user %q, group %q; want one of its own", st["Uid"], st["Gid"])
	}
	if got := procStatus(t, other.findVM())["Uid"]; got == st["Uid"] {
		t.Errorf("QEMU of two pods runs as the same user, %s", got)
	}
	for field, want := range map[string]string{
		"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000", "CapAmb": "0000000000000000",
		"Groups": "", "NoNewPrivs": "1", "Seccomp": "2",
	} {
		if st[field] != want {
			t.Errorf("%s of QEMU = %q; want %q", field, st[field], want)
		}
	}
	apart(t, vm, "net", "mnt")
	if cgroup, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", vm)); err != nil || !strings.Contains(string(cgroup), s.id) {
		t.Errorf("QEMU is in cgroups %s, %v; want the pod's", cgroup, err)
	}

	daemons := append([]int{s.child("virtiofsd")}, children(t, s.child("virtiofsd"))...)
	server := daemons[len(daemons)-1]
	apart(t, server, "net", "mnt", "pid")
	seen, err := os.ReadDir(fmt.Sprintf("/proc/%d/root", server))
	if err != nil {
		t.Fatal(err)
	}
	own := regexp.MustCompile(`^` + regexp.QuoteMeta(s.id) + `\.\d+$`)
	if len(seen) != 1 || !own.MatchString(seen[0].Name()) {
		t.Errorf("virtiofsd's root has %v; want the container's folder alone", seen)
	}
	for _, pid := range daemons {
		if cgroup, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid)); err != nil || !strings.Contains(string(cgroup), s.id) {
			t.Errorf("virtiofsd is in cgroups %s, %v; want the pod's", cgroup, err)
		}
	}
}
