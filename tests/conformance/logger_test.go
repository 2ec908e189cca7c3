package conformance

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/runtime/v2/logging"
)

// TestMain lets the test's own program be a logging binary, made with
// containerd's library: binary:///this?logger=FOLDER.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "logger" {
		logging.Run(func(_ context.Context, c *logging.Config, ready func() error) error {
			return store(os.Args[2], c, ready)
		})
		return
	}
	os.Exit(m.Run())
}

// store writes both streams to files, and who they are of.
func store(dir string, c *logging.Config, ready func() error) error {
	if err := os.WriteFile(filepath.Join(dir, "id"), []byte(c.Namespace+"/"+c.ID), 0o644); err != nil {
		return err
	}
	var wg sync.WaitGroup
	var failed [2]error
	for i, r := range []io.Reader{c.Stdout, c.Stderr} {
		f, err := os.Create(filepath.Join(dir, []string{"stdout", "stderr"}[i]))
		if err != nil {
			return err
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			_, failed[i] = io.Copy(f, r)
		}()
	}
	if err := ready(); err != nil {
		return err
	}
	wg.Wait()
	for _, err := range failed {
		if err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(dir, "ended"), nil, 0o644)
}

// loggerURI names the test's program as logging binary.
func loggerURI(t testing.TB, scheme, dir string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return (&url.URL{Scheme: scheme, Path: self, RawQuery: url.Values{"logger": {dir}}.Encode()}).String()
}

func TestBinaryLogger(t *testing.T) {
	s := newShim(t, options{})
	s.running(t, options{spec: sleeper})
	for _, scheme := range []string{"binary", "binary-v2"} {
		t.Run(scheme, func(t *testing.T) {
			dir := t.TempDir()
			uri := loggerURI(t, scheme, dir)
			c := s.add(t, args("sh", "-c", "head -c 300000 /dev/zero; echo err >&2; exit 3"))
			c.mustCreate(&streams{stdout: uri, stderr: uri}, false)
			c.mustStart("")
			if got := c.wait(""); got != 3 {
				t.Errorf("exit status = %d; want 3", got)
			}
			c.delete("")
			stdout, _ := os.ReadFile(filepath.Join(dir, "stdout"))
			stderr, _ := os.ReadFile(filepath.Join(dir, "stderr"))
			id, _ := os.ReadFile(filepath.Join(dir, "id"))
			if len(stdout) != 300000 || string(stderr) != "err\n" || string(id) != namespace+"/"+c.id {
				t.Errorf("the logger of %s has %d bytes of stdout, stderr %q; want 300000, err, of %s", id, len(stdout), stderr, c.id)
			}
			if !exists(filepath.Join(dir, "ended")) {
				t.Error("Delete returned before the logger had seen the end")
			}
		})
	}
	t.Run("missing", func(t *testing.T) {
		c := s.add(t, args("true"))
		_, err := c.create(&streams{stdout: "binary:///no/such/logger"}, false)
		if err == nil || !strings.Contains(err.Error(), "/no/such/logger") {
			t.Errorf("Create = %v; want an error that names the binary", err)
		}
	})
	t.Run("fails", func(t *testing.T) {
		c := s.add(t, args("true"))
		_, err := c.create(&streams{stdout: loggerURI(t, "binary-v2", "/no/such/folder")}, false)
		if err == nil {
			t.Error("Create = nil; want an error of a logger that ended before it was ready")
		}
	})
}

// The last byte arrives whatever the size is next to that of a pipe, a page, a
// buffer.
func TestOutputSizes(t *testing.T) {
	s := newShim(t, args("sleep", "1000"))
	s.mustCreate(nil, false)
	s.mustStart("")
	for _, size := range []int{0, 4095, 4096, 4097, 65535, 65536, 65537, 1<<20 + 1} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			out, errs, status := s.in(t).exec(fmt.Sprintf("e%d", size), "sh", "-c",
				fmt.Sprintf("head -c %d /dev/zero | tr '\\0' x; head -c %d /dev/zero >&2", size, size))
			if len(out) != size || len(errs) != size || strings.Trim(out, "x") != "" || status != 0 {
				t.Errorf("got %d bytes of stdout, %d of stderr, status %d; want %d, %d, 0", len(out), len(errs), status, size, size)
			}
		})
	}
}

// A client that closes its stdin FIFO without CloseIO ends nothing, and what it
// wrote arrives. So it is with runc's shim, which holds the FIFO open as well.
func TestStdinClosedByClient(t *testing.T) {
	for name, rt := range map[string]*runtime{"runc": runcRuntime(t), "vmrt": nil} {
		t.Run(name, func(t *testing.T) {
			s := newShim(t, options{runtime: rt, spec: args("cat").spec})
			st := newStreams(t, true, false)
			s.mustCreate(st, false)
			s.mustStart("")
			io.WriteString(st.in, "written and closed\n")
			st.in.Close()
			st.out.waitFor(t, "written and closed\n")
			// There is no event for what must not happen.
			time.Sleep(300 * time.Millisecond)
			checkState(t, s, task.Status_RUNNING)
			s.closeStdin("")
			if got := s.wait(""); got != 0 {
				t.Errorf("exit status = %d; want 0", got)
			}
		})
	}
}
