package qmp_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/hypervisor/qemu/qmp"
	"github.com/vmrt/vmrt/tests/platform"
)

// startQEMU runs a QEMU without a machine and returns a connection to its
// monitor.
func startQEMU(t *testing.T) net.Conn {
	t.Helper()
	path, err := platform.QEMU()
	if err != nil {
		t.Skip(err)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "qmp"), os.NewFile(uintptr(fds[1]), "qmp")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "-M", "none", "-nodefaults", "-no-user-config", "-display", "none",
		"-chardev", "socket,id=qmp,fd=3", "-mon", "chardev=qmp,mode=control")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.ExtraFiles = []*os.File{theirs}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("QEMU's stderr: %s", stderr.Bytes())
		}
	})
	return conn
}

func TestIntegrationQEMU(t *testing.T) {
	c, err := qmp.Connect(timeout(t), startQEMU(t))
	if err != nil {
		t.Fatalf("Connect() = %v", err)
	}
	defer c.Close()
	if c.Version().Major < 7 {
		t.Errorf("Version() = %+v; want 7.2 or newer", c.Version())
	}
	t.Run("concurrent", func(t *testing.T) {
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				var status struct{ Status string }
				if err := c.Execute(timeout(t), "query-status", nil, &status); err != nil || status.Status == "" {
					t.Errorf("Execute(query-status) = %v, %+v", err, status)
				}
			})
		}
		wg.Wait()
	})
	t.Run("longest answer", func(t *testing.T) {
		var schema json.RawMessage
		if err := c.Execute(timeout(t), "query-qmp-schema", nil, &schema); err != nil {
			t.Errorf("Execute(query-qmp-schema) = %v", err)
		}
		t.Logf("query-qmp-schema: %d bytes", len(schema))
	})
	t.Run("fault", func(t *testing.T) {
		err := c.Execute(timeout(t), "device_del", map[string]string{"id": "none"}, nil)
		var fault *qmp.Error
		if !errors.As(err, &fault) || fault.Class != "DeviceNotFound" {
			t.Errorf("Execute(device_del) = %v; want DeviceNotFound", err)
		}
	})
	t.Run("descriptors", func(t *testing.T) { testDescriptors(t, c) })
	t.Run("shutdown event", func(t *testing.T) { testShutdown(t, c) })
}

func testDescriptors(t *testing.T, c *qmp.Client) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := c.AddFD(timeout(t), f)
	if err != nil {
		t.Fatalf("AddFD() = %v", err)
	}
	var sets []struct {
		Set int `json:"fdset-id"`
	}
	if err := c.Execute(timeout(t), "query-fdsets", nil, &sets); err != nil || len(sets) != 1 || sets[0].Set != fd.Set {
		t.Errorf("query-fdsets = %+v, %v; want set %d", sets, err, fd.Set)
	}
	if err := c.GetFD(timeout(t), "file", f); err != nil {
		t.Errorf("GetFD() = %v", err)
	}
	if err := c.Execute(timeout(t), "closefd", map[string]string{"fdname": "file"}, nil); err != nil {
		t.Errorf("Execute(closefd) = %v", err)
	}
}

func testShutdown(t *testing.T, c *qmp.Client) {
	s := c.Subscribe("SHUTDOWN")
	defer s.Close()
	if err := c.Execute(timeout(t), "quit", nil, nil); err != nil {
		t.Fatalf("Execute(quit) = %v", err)
	}
	ev, err := s.Next(timeout(t))
	if err != nil || ev.Name != "SHUTDOWN" || time.Since(ev.Time).Abs() > time.Minute {
		t.Errorf("Next() = %+v, %v; want SHUTDOWN now", ev, err)
	}
	select {
	case <-c.Done():
	case <-timeout(t).Done():
		t.Fatal("the connection does not end with QEMU")
	}
	if err := c.Execute(context.Background(), "query-status", nil, nil); !errors.Is(err, io.EOF) {
		t.Errorf("Execute() after QEMU's end = %v; want io.EOF", err)
	}
}
