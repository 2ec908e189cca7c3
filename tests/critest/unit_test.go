package critest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func writeFile(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestReadReport(t *testing.T) {
	file := writeFile(t, `[{"SpecialSuiteFailureReasons": ["Suite Timeout Elapsed"], "SpecReports": [
		{"LeafNodeType": "BeforeSuite", "State": "passed"},
		{"LeafNodeType": "AfterSuite", "State": "panicked", "Failure": {"Message": "m", "ForwardedPanic": "p"}},
		{"ContainerHierarchyTexts": ["[k8s.io] A", "b"], "LeafNodeType": "It", "LeafNodeText": "c", "State": "passed", "RunTime": 1500000000},
		{"LeafNodeType": "It", "LeafNodeText": "filtered out", "State": "skipped"},
		{"LeafNodeType": "It", "LeafNodeText": "skips", "State": "skipped", "Failure": {"Message": "no AppArmor", "Location": {"FileName": "a.go", "LineNumber": 1}}},
		{"LeafNodeType": "It", "LeafNodeText": "fails", "State": "failed", "Failure": {"Message": "why", "Location": {"FileName": "a.go", "LineNumber": 7}}}
	]}]`)
	want := []spec{
		{Name: "AfterSuite", State: "panicked", Message: "m\np"},
		{Name: "[k8s.io] A b c", State: "passed", Took: 1500 * time.Millisecond},
		{Name: "filtered out", State: "skipped", Message: leftOut},
		{Name: "skips", State: "skipped", Message: "no AppArmor"},
		{Name: "fails", State: "failed", Message: "a.go:7: why"},
		{Name: "suite", State: "failed", Message: "Suite Timeout Elapsed"},
	}
	got, err := readReport(file)
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("readReport = %v; (-want +got):\n%s", err, diff)
	}
	if _, err := readReport(writeFile(t, `[{"SpecReports": [`)); err == nil {
		t.Error("readReport of half a report = nil error; want one")
	}
}

func TestReadExceptions(t *testing.T) {
	const head = "# Title\n\n| spec | runtime | outcome | reason |\n|---|---|---|---|\n"
	got, err := readExceptions(writeFile(t, head+
		"| `[k8s.io] A b` | vmrt | fails | needs the host |\n| `c` | both | skips | no AppArmor |\n| `d` | runc | skips | x |\n"))
	want := []exception{
		{"[k8s.io] A b", "vmrt", "fails", "needs the host"},
		{"c", "both", "skips", "no AppArmor"},
	}
	if diff := cmp.Diff(want, forRuntime(got, "vmrt")); diff != "" || err != nil {
		t.Errorf("readExceptions = %v; for vmrt (-want +got):\n%s", err, diff)
	}
	for _, row := range []string{"| a | crun | fails | x |", "| a | vmrt | flakes | x |", "| a | vmrt | fails | |"} {
		if _, err := readExceptions(writeFile(t, head+row+"\n")); err == nil || !strings.Contains(err.Error(), ":5: ") {
			t.Errorf("readExceptions(%s) = %v; want an error that names line 5", row, err)
		}
	}
}

func TestFind(t *testing.T) {
	all := []exception{{Spec: "a b"}, {Spec: "a c *"}}
	for name, want := range map[string]int{"a b": 0, "a b c": -1, "a c d": 1, "a c e f": 1, "a c": -1, "d": -1} {
		if got := find(all, name); got != want {
			t.Errorf("find(%q) = %d; want %d", name, got, want)
		}
	}
}

func TestVerdict(t *testing.T) {
	fails := &exception{Outcome: "fails", Reason: "needs the host"}
	skips := &exception{Outcome: "skips", Reason: "no AppArmor"}
	for _, tt := range []struct {
		name      string
		state     string
		exception *exception
		bad, skip bool
	}{
		{"passes", "passed", nil, false, false},
		{"fails", "failed", nil, true, false},
		{"times out", "timedout", nil, true, false},
		{"skips", "skipped", nil, true, false},
		{"fails as listed", "failed", fails, false, true},
		{"skips as listed", "skipped", skips, false, true},
		{"passes though listed to fail", "passed", fails, true, false},
		{"passes though listed to skip", "passed", skips, true, false},
		{"skips though listed to fail", "skipped", fails, true, false},
		{"fails though listed to skip", "failed", skips, true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var e exception
			if tt.exception != nil {
				e = *tt.exception
			}
			bad, skip := verdict(spec{State: tt.state, Message: "why"}, e, tt.exception != nil)
			if (bad != "") != tt.bad || (skip != "") != tt.skip {
				t.Errorf("verdict = %q, %q; want bad %v, skip %v", bad, skip, tt.bad, tt.skip)
			}
		})
	}
}
