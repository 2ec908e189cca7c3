// Command testsum turns the output of `go test -json` into something to read
// while it runs, and into a closing line. It reads standard input:
//
//	go test -json ./... | testsum [-o FILE]
//	testsum -total FILE...
//
// One line tells the end of each package, and now and then one how far a long
// one has come; failed tests print what they wrote, and skipped tests their
// reason. The closing line is
//
//	N passed, N failed, N skipped
//
// where a test with subtests counts by its subtests alone, a test that did not
// end before its package did has failed, and a package that fails outside of
// any test counts as one failure. -o appends the events to a
// file, and -total prints the closing line for such files together. The exit
// code is 1 if anything failed, or if there was no test at all.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
)

// event is what `go doc test2json` describes. FailedBuild and the build-
// actions are described by `go help buildjson`.
type event struct {
	Action      string
	Package     string
	ImportPath  string
	Test        string
	Elapsed     float64
	Output      string
	FailedBuild string
}

func main() {
	log := flag.String("o", "", "append the events to this `file`")
	total := flag.Bool("total", false, "read files of events and print the closing line alone")
	flag.Parse()
	s := newSummary(os.Stdout)
	var err error
	if *total {
		s.out = io.Discard
		err = readFiles(s, flag.Args())
	} else {
		err = readInput(s, *log)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "testsum:", err)
		os.Exit(1)
	}
	fmt.Println(s.line())
	if s.failed > 0 || s.passed == 0 {
		os.Exit(1)
	}
}

func readFiles(s *summary, names []string) error {
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		err = s.read(f)
		f.Close()
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
	}
	return nil
}

func readInput(s *summary, log string) error {
	if log == "" {
		return s.read(os.Stdin)
	}
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	if err := s.read(io.TeeReader(os.Stdin, f)); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

// summary collects the events of one or several runs.
type summary struct {
	out                     io.Writer
	start, spoke            time.Time
	passed, failed, skipped int

	output  map[string]*strings.Builder // by test
	running map[string][]string         // tests that have not ended, by package
	parents map[string]bool             // tests that have subtests
	counts  map[string]int              // tests that failed, by package
	tests   map[string]int              // tests that ended, by package
}

func newSummary(out io.Writer) *summary {
	return &summary{
		out: out, start: time.Now(), spoke: time.Now(), output: map[string]*strings.Builder{},
		running: map[string][]string{}, parents: map[string]bool{}, counts: map[string]int{}, tests: map[string]int{},
	}
}

func (s *summary) line() string {
	return fmt.Sprintf("%d passed, %d failed, %d skipped", s.passed, s.failed, s.skipped)
}

// read takes events until the end of r. Lines that are none are passed on:
// they are what a go command says that could not run.
func (s *summary) read(r io.Reader) error {
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		var e event
		if json.Unmarshal(sc.Bytes(), &e) != nil || e.Action == "" {
			fmt.Fprintln(s.out, sc.Text())
			continue
		}
		s.event(e)
		s.progress(e)
	}
	return sc.Err()
}

// quiet is how long nothing is said of a package that runs.
const quiet = 20 * time.Second

func (s *summary) progress(e event) {
	if e.Test == "" || e.Action == "output" || time.Since(s.spoke) < quiet {
		return
	}
	s.spoke = time.Now()
	fmt.Fprintf(s.out, "      %s: %d tests so far, at %s, at %.0f s\n",
		short(e.Package), s.tests[e.Package], e.Test, time.Since(s.start).Seconds())
}

func (s *summary) event(e event) {
	key := e.Package + " " + e.Test
	switch e.Action {
	case "run":
		s.running[e.Package] = append(s.running[e.Package], e.Test)
		for t := e.Test; ; {
			i := strings.LastIndex(t, "/")
			if i < 0 {
				break
			}
			t = t[:i]
			s.parents[e.Package+" "+t] = true
		}
	case "output":
		b := s.output[key]
		if b == nil {
			b = &strings.Builder{}
			s.output[key] = b
		}
		b.WriteString(e.Output)
	case "build-output":
		fmt.Fprint(s.out, e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			s.packageEnd(e)
		} else {
			s.testEnd(e, key)
		}
		delete(s.output, key)
	}
}

func (s *summary) testEnd(e event, key string) {
	s.running[e.Package] = slices.DeleteFunc(s.running[e.Package], func(t string) bool { return t == e.Test })
	s.tests[e.Package]++
	switch e.Action {
	case "fail":
		s.counts[e.Package]++
		fmt.Fprintf(s.out, "FAIL  %s %s (%.1f s)\n%s", short(e.Package), e.Test, e.Elapsed, s.text(key))
	case "skip":
		fmt.Fprintf(s.out, "skip  %s %s: %s\n", short(e.Package), e.Test, reason(s.text(key)))
	}
	if s.parents[key] {
		return
	}
	switch e.Action {
	case "pass":
		s.passed++
	case "fail":
		s.failed++
	case "skip":
		s.skipped++
	}
}

func (s *summary) packageEnd(e event) {
	for _, test := range slices.Clone(s.running[e.Package]) {
		key := e.Package + " " + test
		s.testEnd(event{Action: "fail", Package: e.Package, Test: test}, key)
		delete(s.output, key)
	}
	s.spoke = time.Now()
	at := fmt.Sprintf("at %.0f s", time.Since(s.start).Seconds())
	switch {
	case e.Action == "fail":
		if s.counts[e.Package] == 0 {
			s.failed++
		}
		// What no test wrote: panics, log output.
		for line := range strings.Lines(s.text(e.Package + " ")) {
			if !strings.HasPrefix(line, "FAIL") {
				fmt.Fprint(s.out, line)
			}
		}
		fmt.Fprintf(s.out, "FAIL  %s: %d tests failed, %.1f s, %s\n", short(e.Package), s.counts[e.Package], e.Elapsed, at)
	case s.tests[e.Package] > 0:
		fmt.Fprintf(s.out, "ok    %s: %d tests, %.1f s, %s\n", short(e.Package), s.tests[e.Package], e.Elapsed, at)
	}
}

func (s *summary) text(key string) string {
	if b := s.output[key]; b != nil {
		return b.String()
	}
	return ""
}

// reason picks the message of t.Skip out of a test's output: the last line
// that is not the testing package's own.
func reason(output string) string {
	lines := strings.Split(strings.TrimSpace(output), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		if l := strings.TrimSpace(lines[i]); !strings.HasPrefix(l, "--- ") && !strings.HasPrefix(l, "=== ") {
			return l
		}
	}
	return "no reason given"
}

// short leaves out the module's name.
func short(pkg string) string { return strings.TrimPrefix(pkg, "github.com/vmrt/vmrt/") }
