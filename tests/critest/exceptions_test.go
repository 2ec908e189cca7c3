package critest

import (
	"fmt"
	"os"
	"slices"
	"strings"
)

// exception is a spec that does not pass, and why.
type exception struct {
	// Spec is the spec's whole name, or ends in "*" and stands for all that
	// begin with the rest.
	Spec string
	// Runtime is "vmrt", "runc" or "both".
	Runtime string
	// Outcome is "fails" or "skips".
	Outcome string
	Reason  string
}

// readExceptions reads the table of the documentation: the lines of four
// columns whose second one is a runtime.
func readExceptions(file string) ([]exception, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read exceptions: %w", err)
	}
	var all []exception
	for i, line := range strings.Split(string(b), "\n") {
		if !strings.HasPrefix(line, "|") {
			continue
		}
		var cells []string
		for _, c := range strings.Split(strings.Trim(line, "|"), "|") {
			cells = append(cells, strings.Trim(strings.TrimSpace(c), "`"))
		}
		if len(cells) != 4 || cells[1] == "runtime" || strings.Trim(cells[1], "-") == "" {
			continue
		}
		e := exception{cells[0], cells[1], cells[2], cells[3]}
		if !slices.Contains([]string{"vmrt", "runc", "both"}, e.Runtime) ||
			!slices.Contains([]string{"fails", "skips"}, e.Outcome) || e.Reason == "" {
			return nil, fmt.Errorf("%s:%d: want spec, runtime (vmrt, runc, both), outcome (fails, skips) and reason, not %q", file, i+1, cells)
		}
		all = append(all, e)
	}
	return all, nil
}

// forRuntime returns the exceptions of one runtime.
func forRuntime(all []exception, runtime string) []exception {
	return slices.DeleteFunc(slices.Clone(all), func(e exception) bool {
		return e.Runtime != runtime && e.Runtime != "both"
	})
}

// find returns the index of a spec's exception, or -1.
func find(all []exception, name string) int {
	return slices.IndexFunc(all, func(e exception) bool {
		prefix, several := strings.CutSuffix(e.Spec, "*")
		return e.Spec == name || several && strings.HasPrefix(name, prefix)
	})
}

// verdict tells what a spec's outcome means, given its exception if there is
// one: bad says what is wrong, else skip why it did not pass although nothing
// is wrong. Both are empty for a spec that passed as it should.
func verdict(s spec, e exception, listed bool) (bad, skip string) {
	switch {
	case s.State == "passed" && !listed:
		return "", ""
	case s.State == "passed":
		return "it passes, but docs/critest.md says that it " + e.Outcome, ""
	case s.State == "skipped" && listed && e.Outcome == "skips":
		return "", "known to skip: " + e.Reason
	case s.State == "skipped":
		return "it skips itself, which docs/critest.md does not say: " + s.Message, ""
	case listed && e.Outcome == "fails":
		return "", "known to fail: " + e.Reason
	default:
		return s.State + ": " + s.Message, ""
	}
}
