// Package hack tests the Makefile and the scripts that it runs.
package hack

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// `make help` lists every target, once.
func TestHelp(t *testing.T) {
	out, err := exec.Command("make", "--no-print-directory", "-C", "..", "help").CombinedOutput()
	help := string(out)
	if err != nil {
		t.Fatal(err, help)
	}
	targets := 0
	for line := range strings.Lines(read(t, "../Makefile") + read(t, "../guest.mk")) {
		names, ok := strings.CutPrefix(strings.TrimSpace(line), ".PHONY:")
		if !ok {
			continue
		}
		for name := range strings.FieldsSeq(names) {
			if strings.HasPrefix(name, "$") {
				continue // files by their names
			}
			targets++
			if n := len(regexp.MustCompile(`(?m)^  `+regexp.QuoteMeta(name)+` +\S`).FindAllString(help, -1)); n != 1 {
				t.Errorf("make help has %d lines of %s; want 1", n, name)
			}
		}
	}
	if targets < 15 {
		t.Errorf("found %d targets; want all", targets)
	}
}

// What needs root says so, and does nothing.
func TestNeedsRoot(t *testing.T) {
	uid := uint32(os.Geteuid())
	if uid == 0 {
		uid = 65534
	}
	// Another user may not be let in; of make it is what the Makefile says that counts.
	dir := t.TempDir()
	for _, name := range []string{"Makefile", "guest.mk"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(read(t, "../"+name)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for p := dir; p != os.TempDir() && p != "/"; p = filepath.Dir(p) {
		if err := os.Chmod(p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, target := range []string{"demo", "test", "test-vm", "test-qemu", "test-kvm", "critest", "bench", "deps"} {
		cmd := exec.Command("make", "--no-print-directory", "-C", dir, target)
		cmd.SysProcAttr = &syscall.SysProcAttr{}
		if os.Geteuid() == 0 {
			cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uid, Gid: uid}
		}
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Run(); err == nil || !strings.Contains(out.String(), "make "+target+" needs root: run it as root, for example by 'sudo make "+target+"'") {
			t.Errorf("make %s as user %d = %v: %s; want it to say that it needs root", target, uid, err, out.String())
		}
	}
}

// The tests that test.sh chooses by their names are there.
func TestNamedTests(t *testing.T) {
	entry := regexp.MustCompile(`(?m)^\t'(\S+) \^Test(\S+?)\$?(?:/\S+)?'$`)
	entries := entry.FindAllStringSubmatch(read(t, "test.sh"), -1)
	if len(entries) < 5 {
		t.Fatalf("found %d entries in test.sh; want those of KVM", len(entries))
	}
	for _, e := range entries {
		pkg, names := e[1], strings.Trim(strings.TrimSuffix(e[2], "$"), "()")
		prefix := ""
		if p, rest, ok := strings.Cut(names, "("); ok {
			prefix, names = p, rest
		}
		files, err := filepath.Glob(filepath.Join("..", pkg, "*_test.go"))
		if err != nil || len(files) == 0 {
			t.Errorf("test.sh names package %s, which has no tests", pkg)
			continue
		}
		var source strings.Builder
		for _, f := range files {
			source.WriteString(read(t, f))
		}
		for name := range strings.SplitSeq(names, "|") {
			if !strings.Contains(source.String(), "\nfunc Test"+prefix+name) {
				t.Errorf("test.sh names Test%s%s of %s, which is not there", prefix, name, pkg)
			}
		}
	}
}

// hack/bin/go does not take itself for Go, whatever its folder is called.
func TestGoInOddFolders(t *testing.T) {
	for _, name := range []string{"plain", "a b", "a[1]", "a|b", "a*", "a.+b"} {
		t.Run(name, func(t *testing.T) {
			top := filepath.Join(t.TempDir(), name)
			bin := filepath.Join(top, "hack", "bin")
			if err := os.MkdirAll(bin, 0o755); err != nil {
				t.Fatal(err)
			}
			for file, mode := range map[string]os.FileMode{"bin/go": 0o755, "../go.mod": 0o644} {
				if err := os.WriteFile(filepath.Join(top, "hack", file), []byte(read(t, file)), mode); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			cmd := exec.CommandContext(ctx, filepath.Join(bin, "go"), "-path")
			cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
			out, err := cmd.CombinedOutput()
			got := strings.TrimSpace(string(out))
			if err != nil || !filepath.IsAbs(got) || strings.HasPrefix(got, top) {
				t.Errorf("hack/bin/go -path = %q, %v; want another Go", got, err)
			}
		})
	}
}

// A cron job or a service of systemd has no HOME.
func TestWithoutHome(t *testing.T) {
	u, err := user.Current()
	if err != nil || u.HomeDir == "" {
		t.Skipf("the user's home: %v", err)
	}
	var env []string
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "HOME=") && !strings.HasPrefix(v, "XDG_CACHE_HOME=") {
			env = append(env, v)
		}
	}
	for _, args := range [][]string{
		{"make", "--no-print-directory", "-C", "..", "--eval", "show:;@echo $$HOME/.cache/vmrt", "show"},
		{"bash", "-c", ". ../guest/lib.sh; echo $CACHE"},
	} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env = env
		out, err := cmd.CombinedOutput()
		if got, want := strings.TrimSpace(string(out)), filepath.Join(u.HomeDir, ".cache/vmrt"); err != nil || got != want {
			t.Errorf("%q without HOME = %q, %v; want %q", args, got, err, want)
		}
	}
}
