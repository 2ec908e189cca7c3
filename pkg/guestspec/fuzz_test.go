package guestspec

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// FuzzRewrite holds Rewrite to what it promises for every spec: no panic, no
// change of its input, and no host path in the guest's mounts.
func FuzzRewrite(f *testing.F) {
	for _, name := range []string{"ctr", "nerdctl", "privileged"} {
		b, err := os.ReadFile("testdata/" + name + ".json")
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var s, same specs.Spec
		if json.Unmarshal(b, &s) != nil || json.Unmarshal(b, &same) != nil {
			t.Skip("no spec")
		}
		plan, err := Rewrite(input(&s))
		if diff := cmp.Diff(same, s); diff != "" {
			t.Errorf("Rewrite changed its input (-want +got):\n%s", diff)
		}
		if err != nil {
			if plan != nil {
				t.Error("Rewrite returned a plan beside an error")
			}
			return
		}
		if got := len(plan.Spec.Mounts); got != len(s.Mounts) {
			t.Errorf("%d mounts became %d", len(s.Mounts), got)
		}
		for _, m := range plan.Spec.Mounts {
			if strings.HasPrefix(m.Source, "/") && !strings.HasPrefix(m.Source, SharePath("web", 0)[:len("/run/vmrt/share/")]) && !ofGuest(m.Source) {
				t.Errorf("mount %+v names a path of the host", m)
			}
		}
		if plan.Spec.Annotations != nil || plan.Spec.Linux.CgroupsPath != "/vmrt/web" || plan.Spec.Root.Path != "rootfs" {
			t.Errorf("spec = %+v; want no annotations and the guest's own paths", plan.Spec)
		}
	})
}
