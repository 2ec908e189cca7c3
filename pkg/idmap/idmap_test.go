package idmap

import (
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// list is Parse for what is known to be well-formed.
func list(text string) []specs.LinuxIDMapping {
	l, err := Parse(text)
	if err != nil {
		panic(err)
	}
	return l
}

func TestCheck(t *testing.T) {
	good := list("0:1000:65536")
	many := make([]specs.LinuxIDMapping, MaxExtents+1)
	for i := range many {
		many[i] = specs.LinuxIDMapping{ContainerID: uint32(i), HostID: uint32(1000 + i), Size: 1}
	}
	for _, tc := range []struct {
		name string
		m    Mapping
		want string // empty: no error
	}{
		{"plain", Mapping{good, good}, ""},
		{"two extents", Mapping{list("0:1000:1,1:5000:100"), good}, ""},
		{"the last id", Mapping{list("0:0:4294967295"), good}, ""},
		{"as many as may be", Mapping{many[:MaxExtents], good}, ""},
		{"no users", Mapping{nil, good}, "user namespaces enabled, but no uid mappings found"},
		{"no groups", Mapping{good, nil}, "user namespaces enabled, but no gid mappings found"},
		{"too many", Mapping{many, good}, "17 uid mappings: at most 16"},
		{"empty extent", Mapping{list("0:1000:0"), good}, "uid mapping 0:1000:0: want ids from 0 to 4294967294"},
		{"too far outside", Mapping{good, list("0:4294967295:1")}, "gid mapping 0:4294967295:1: want ids from 0 to 4294967294"},
		{"too far inside", Mapping{good, list("1:0:4294967295")}, "gid mapping 1:0:4294967295: want ids from 0 to 4294967294"},
		{"twice inside", Mapping{list("0:1000:10,9:5000:10"), good}, "uid mappings 0:1000:10 and 9:5000:10 overlap"},
		{"twice outside", Mapping{list("0:1000:10,10:1009:10"), good}, "uid mappings 0:1000:10 and 10:1009:10 overlap"},
		{"no root", Mapping{list("1:1000:10"), good}, "container uid 0 is not mapped"},
		{"no root group", Mapping{good, list("1:1000:10")}, "container gid 0 is not mapped"},
	} {
		err := tc.m.Check()
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || err.Error() != tc.want) {
			t.Errorf("%s: Check = %v; want %q", tc.name, err, tc.want)
		}
	}
}

func TestEqual(t *testing.T) {
	a := Mapping{list("0:1000:1,1:5000:100"), list("0:1:1")}
	turned := Mapping{list("1:5000:100,0:1000:1"), list("0:1:1")}
	other := Mapping{a.UIDs, list("0:2:1")}
	if !a.Equal(turned) || a.Equal(other) || a.Equal(Mapping{}) {
		t.Errorf("Equal: %v %v %v; want true false false", a.Equal(turned), a.Equal(other), a.Equal(Mapping{}))
	}
	if a.IsZero() || !(Mapping{}).IsZero() {
		t.Error("IsZero is wrong")
	}
}

func TestRoot(t *testing.T) {
	m := Mapping{list("5:7000:1,0:1000:5"), list("0:2000:1")}
	if uid, gid := m.Root(); uid != 1000 || gid != 2000 {
		t.Errorf("Root = %d, %d; want 1000, 2000", uid, gid)
	}
}

func TestFormatParse(t *testing.T) {
	extents := list("0:1000:65536,65536:4294967294:1")
	text := Format(extents)
	if want := "0:1000:65536,65536:4294967294:1"; text != want {
		t.Errorf("Format = %q; want %q", text, want)
	}
	back, err := Parse(text)
	if err != nil || !slices.Equal(back, extents) {
		t.Errorf("Parse(%q) = %v, %v", text, back, err)
	}
	for _, bad := range []string{"", "0:1", "0:1:2:3", "a:1:2", "-1:1:2", "0:4294967296:1", "0:1:2,", "0:1: 2"} {
		if _, err := Parse(bad); err == nil || !strings.Contains(err.Error(), "want container:host:size") {
			t.Errorf("Parse(%q) = %v", bad, err)
		}
	}
}
