package critest

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"time"
)

// spec is one test of critest that ran, or that skipped itself.
type spec struct {
	// Name is its whole name, from the outermost group on.
	Name string
	// State is ginkgo's: "passed", "skipped", "failed", "timedout", ….
	State string
	// Message says why it did not pass.
	Message string
	// Took is how long it ran.
	Took time.Duration
}

// leftOut is the message of a spec that ginkgo was told not to run.
const leftOut = "left out by its name"

// readReport reads the JSON report of ginkgo (package types of
// github.com/onsi/ginkgo/v2, types Report and SpecReport). What fails around
// the specs counts as a spec of its own.
func readReport(file string) ([]spec, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read critest's report: %w", err)
	}
	var suites []struct {
		SpecialSuiteFailureReasons []string
		SpecReports                []struct {
			ContainerHierarchyTexts []string
			LeafNodeType            string
			LeafNodeText            string
			State                   string
			RunTime                 time.Duration
			Failure                 struct {
				Message        string
				ForwardedPanic string
				Location       struct {
					FileName   string
					LineNumber int
				}
			}
		}
	}
	if err := json.Unmarshal(b, &suites); err != nil {
		return nil, fmt.Errorf("read critest's report %s: %w", file, err)
	}
	var specs []spec
	for _, suite := range suites {
		for _, r := range suite.SpecReports {
			name := strings.Join(append(r.ContainerHierarchyTexts, r.LeafNodeText), " ")
			if r.LeafNodeType != "It" {
				if r.State == "passed" {
					continue
				}
				name = strings.TrimSpace(r.LeafNodeType + " " + name)
			}
			f := r.Failure
			if r.State == "skipped" && f.Message == "" {
				f.Message = leftOut
			}
			message := strings.TrimSpace(f.Message + "\n" + f.ForwardedPanic)
			if f.Location.FileName != "" && r.State != "skipped" {
				message = fmt.Sprintf("%s:%d: %s", f.Location.FileName, f.Location.LineNumber, message)
			}
			specs = append(specs, spec{Name: name, State: r.State, Message: message, Took: r.RunTime})
		}
		for _, reason := range suite.SpecialSuiteFailureReasons {
			specs = append(specs, spec{Name: "suite", State: "failed", Message: reason})
		}
	}
	return specs, nil
}
