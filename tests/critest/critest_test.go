// Package critest runs critest, the conformance tests of the CRI, on a private
// containerd. Every spec is a subtest. Those that are listed in docs/critest.md
// do as it says; all others pass, or else the test fails.
//
//	go test ./tests/critest -run TestCRI -runtime vmrt [-sandboxer shim] [-focus REGEXP] [-nodes N]
//
// `make critest` does so for each sandboxer. What critest prints, its report
// and containerd's log are kept below bin/critest.
package critest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vmrt/vmrt/hack/tools"
	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/criimage"
)

var (
	runtimeName = flag.String("runtime", "vmrt", "runtime `handler` under test: vmrt or runc")
	sandboxer   = flag.String("sandboxer", "", "podsandbox or shim; both, if the runtime knows both, when empty")
	focus       = flag.String("focus", "", "run only specs whose names match the `regexp`")
	nodes       = flag.Int("nodes", 4, "run so many specs at once")
)

func TestCRI(t *testing.T) {
	env.NeedRoot(t)
	env.NeedProgram(t, "ipcs", "ipcmk")
	modes := env.Modes
	switch {
	case *sandboxer != "":
		modes = []string{*sandboxer}
	case *runtimeName == "runc":
		modes = []string{"podsandbox"}
	}
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) { testCRI(t, mode) })
	}
}

func testCRI(t *testing.T, mode string) {
	root, err := tools.Root()
	if err != nil {
		t.Fatal(err)
	}
	all, err := readExceptions(filepath.Join(root, "docs", "critest.md"))
	if err != nil {
		t.Fatal(err)
	}
	listed := forRuntime(all, *runtimeName)
	bin := filepath.Join(root, "bin")
	if *runtimeName == "vmrt" {
		env.NeedProgram(t, "qemu-system-x86_64")
		bin = env.NeedBuild(t)
	}
	ctx := env.Context(t)
	images, err := criimage.All(ctx)
	if err != nil {
		t.Fatal(err)
	}
	e := env.ForTest(t, env.Config{
		BinDirs: []string{bin}, Tools: []string{"critest"},
		CRI: &env.CRI{Runtime: *runtimeName, Sandboxer: mode, Images: images},
	})
	out := filepath.Join(root, "bin", "critest", *runtimeName+"-"+mode)
	if err := errors.Join(os.RemoveAll(out), os.MkdirAll(out, 0o755)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(filepath.Join(out, "containerd.log"), []byte(e.Log()), 0o644); err != nil {
			t.Error(err)
		}
	})
	start := time.Now()
	if err := runCritest(ctx, t, e, out); err != nil {
		t.Error(err)
	}
	took := time.Since(start)
	specs, err := readReport(filepath.Join(out, "report.json"))
	if err != nil {
		t.Fatal(err)
	}
	if *focus != "" {
		specs = slices.DeleteFunc(specs, func(s spec) bool { return s.Message == leftOut })
	}
	counts := map[string]int{}
	used := make([]bool, len(listed))
	for _, s := range specs {
		counts[s.State]++
		var e exception
		i := find(listed, s.Name)
		if i >= 0 {
			e, used[i] = listed[i], true
		}
		t.Run(strings.ReplaceAll(s.Name, "/", "-"), func(t *testing.T) {
			switch bad, skip := verdict(s, e, i >= 0); {
			case bad != "":
				t.Errorf("after %.1f s %s", s.Took.Seconds(), bad)
			case skip != "":
				t.Skip(skip)
			}
		})
	}
	for i, e := range listed {
		if *focus == "" && !used[i] {
			t.Errorf("docs/critest.md lists %q, which does not exist", e.Spec)
		}
	}
	if len(specs) == 0 {
		t.Error("critest ran nothing")
	}
	summary := fmt.Sprintf("critest, %s, sandboxer %s: %s in %.0f s, %d at once", *runtimeName, mode, outcomes(counts), took.Seconds(), *nodes)
	t.Log(summary)
	if err := writeSummary(filepath.Join(out, "summary.txt"), summary, specs); err != nil {
		t.Error(err)
	}
}

// runCritest runs critest inside the environment and leaves its output and
// report in the folder out. That specs fail is not an error here.
func runCritest(ctx context.Context, t *testing.T, e *env.Env, out string) error {
	log, err := os.Create(filepath.Join(out, "output.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	path, err := e.LookPath("critest.test")
	if err != nil {
		return err
	}
	args := []string{
		"run", "--no-color", "-v", "--procs", strconv.Itoa(*nodes), "--skip", "benchmark|AppArmor",
		"--json-report", "report.json", "--output-dir", out,
	}
	if *focus != "" {
		args = append(args, "--focus", *focus)
	}
	if d, ok := ctx.Deadline(); ok {
		// Time for ginkgo to write its report.
		args = append(args, "--timeout", (time.Until(d) - 30*time.Second).Round(time.Second).String())
	}
	args = append(args, path, "--",
		"-runtime-endpoint", "unix://"+e.Socket, "-image-endpoint", "unix://"+e.Socket, "-runtime-handler", *runtimeName)
	t.Logf("output: %s", log.Name())
	cmd := e.Command(ctx, "ginkgo", args...)
	// critest leaves folders behind, which go with the environment's.
	tmp := filepath.Join(e.Dir, "tmp")
	if err := os.Mkdir(tmp, 0o777); err != nil {
		return err
	}
	cmd.Env = append(cmd.Env, "TMPDIR="+tmp)
	cmd.Stdout, cmd.Stderr = log, log
	err = cmd.Cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 1 {
		err = nil
	}
	return errors.Join(err, unmountBelow(ctx, e, tmp))
}

// unmountBelow removes the mounts that critest leaves where a container could
// not be created: its own clean-up begins with a mount that was never made.
func unmountBelow(ctx context.Context, e *env.Env, dir string) error {
	const script = `awk -v dir="$1/" 'index($5, dir) == 1 { print $5 }' /proc/self/mountinfo | xargs -r umount -l`
	if out, err := e.Command(ctx, "sh", "-c", script, "sh", dir).Run(); err != nil {
		return fmt.Errorf("unmount what critest left: %w: %s", err, out)
	}
	return nil
}

// outcomes reads "108 passed, 0 failed, 9 skipped".
func outcomes(counts map[string]int) string {
	failed := 0
	for state, n := range counts {
		if state != "passed" && state != "skipped" {
			failed += n
		}
	}
	return fmt.Sprintf("%d passed, %d failed, %d skipped", counts["passed"], failed, counts["skipped"])
}

// writeSummary writes the line, and one line for each spec.
func writeSummary(file, line string, specs []spec) (err error) {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := fmt.Fprintln(f, line); err != nil {
		return err
	}
	for _, s := range specs {
		if err := summarize(f, s); err != nil {
			return err
		}
	}
	return nil
}

func summarize(w io.Writer, s spec) error {
	reason := ""
	if s.State == "skipped" {
		reason = ": " + s.Message
	}
	_, err := fmt.Fprintf(w, "%-8s %6.1f s  %s%s\n", s.State, s.Took.Seconds(), s.Name, reason)
	return err
}
