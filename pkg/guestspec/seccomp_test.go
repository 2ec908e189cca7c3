package guestspec

import (
	"slices"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Filters that differ only in what crun's checksum leaves out have different
// names, and equal ones the same.
func TestSeccompNames(t *testing.T) {
	filter := func(errno uint, names ...string) *specs.LinuxSeccomp {
		return &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
			{Names: names, Action: specs.ActErrno, ErrnoRet: &errno},
		}}
	}
	name := func(s *specs.LinuxSeccomp) string {
		t.Helper()
		before := len(s.Syscalls)
		out, err := rewriteSeccomp(s)
		if err != nil {
			t.Fatal(err)
		}
		last := out.Syscalls[len(out.Syscalls)-1]
		if len(out.Syscalls) != before+1 || last.Action != out.DefaultAction || last.ErrnoRet != nil || len(last.Names) != 1 {
			t.Errorf("rewriteSeccomp added %+v; want one rule of the default action with one name", out.Syscalls[before:])
		}
		return last.Names[0]
	}
	names := []string{name(filter(1, "mkdir", "at")), name(filter(28, "mkdir", "at")), name(filter(1, "mkdirat"))}
	if same := name(filter(1, "mkdir", "at")); same != names[0] {
		t.Errorf("one filter has the names %s and %s; want one", names[0], same)
	}
	slices.Sort(names)
	if got := len(slices.Compact(names)); got != 3 {
		t.Errorf("3 filters have %d names", got)
	}
	if out, err := rewriteSeccomp(nil); out != nil || err != nil {
		t.Errorf("rewriteSeccomp(nil) = %v, %v; want nil, nil", out, err)
	}
}
