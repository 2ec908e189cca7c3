//go:build linux

package storage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/podns/podnstest"
)

// eachDaemon runs f with the virtiofsd that $VMRT_VIRTIOFSD names, or else with
// every one of the machine, in every sandbox.
func eachDaemon(t *testing.T, f func(t *testing.T, cfg DaemonConfig)) {
	podnstest.Root(t)
	seen := map[string]bool{}
	paths := daemonPaths
	if path := os.Getenv("VMRT_VIRTIOFSD"); path != "" {
		paths = []string{path}
	}
	for _, path := range paths {
		path, err := filepath.EvalSymlinks(path)
		if err != nil || seen[path] {
			continue
		}
		seen[path] = true
		for _, sandbox := range []Sandbox{SandboxNamespace, SandboxChroot} {
			t.Run(filepath.Base(path)+","+string(sandbox), func(t *testing.T) {
				f(t, DaemonConfig{Binary: path, Sandbox: sandbox})
			})
		}
	}
	if len(seen) == 0 {
		_, err := FindDaemon()
		t.Skip("needs virtiofsd: ", err)
	}
}

func (p *pod) daemon(cfg DaemonConfig) *Daemon {
	p.t.Helper()
	cfg.Share = p.Share
	d, err := StartDaemon(p.t.Context(), p.ns, cfg)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		if err := d.Close(); err != nil {
			p.t.Errorf("Close() = %v; want nil", err)
		}
	})
	return d
}

// features asks for VHOST_USER_GET_FEATURES (vhost-user protocol, request 1),
// which the daemon answers once it serves.
func features(d *Daemon) (uint64, error) {
	fd := int(d.Socket().Fd())
	timeout := unix.NsecToTimeval(int64(20 * time.Second))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return 0, err
	}
	var msg [12]byte // request, flags: version 1, size: 0
	binary.LittleEndian.PutUint32(msg[0:], 1)
	binary.LittleEndian.PutUint32(msg[4:], 1)
	if _, err := d.Socket().Write(msg[:]); err != nil {
		return 0, err
	}
	var reply [20]byte
	if _, err := io.ReadFull(d.Socket(), reply[:]); err != nil {
		return 0, err
	}
	if size := binary.LittleEndian.Uint32(reply[8:]); size != 8 {
		return 0, fmt.Errorf("reply of %d bytes; want 8", size)
	}
	return binary.LittleEndian.Uint64(reply[12:]), nil
}

// server returns the pid of the daemon's process that serves.
func server(t *testing.T, d *Daemon) int {
	t.Helper()
	pid := d.Pid()
	for {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Sscan(string(b), &pid); err != nil {
			return pid
		}
	}
}

// What is added after the daemon has started is in its sight, and what is
// removed goes.
func TestDaemonSeesLaterMounts(t *testing.T) {
	eachDaemon(t, func(t *testing.T, cfg DaemonConfig) {
		p := newPod(t)
		early := p.bind("web", write(t, filepath.Join(t.TempDir(), "f"), "early"), BindOptions{})
		d := p.daemon(cfg)
		if _, err := features(d); err != nil {
			t.Fatalf("vhost-user request: %v (%v)", err, d.Err())
		}
		root := fmt.Sprintf("/proc/%d/root/", server(t, d))
		rootfs := p.rootfs("web", snapshot(t, t.TempDir(), 2))
		dir, _ := layered(t)
		later := p.bind("db", dir, BindOptions{Recursive: true})
		for _, f := range []string{rootfs.Share + "/f0", rootfs.Share + "/f1", later.Share + "/sub/deep"} {
			if _, err := os.Stat(root + f); err != nil {
				t.Errorf("the daemon does not see what was added after its start: %v", err)
			}
		}
		if b, err := os.ReadFile(root + early.Share); string(b) != "early" {
			t.Errorf("what was added before the daemon's start = %q, %v", b, err)
		}
		if err := os.WriteFile(root+"x", nil, 0o600); !errors.Is(err, unix.EROFS) {
			t.Errorf("write in the daemon's root = %v; want %v", err, unix.EROFS)
		}
		if err := p.RemoveContainer("db"); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(root + later.Share); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the daemon still sees what was removed: %v", err)
		}
		if _, err := os.Stat(root + rootfs.Share + "/f0"); err != nil {
			t.Errorf("the daemon does not see what is left: %v", err)
		}
	})
}

func TestDaemonSandbox(t *testing.T) {
	eachDaemon(t, func(t *testing.T, cfg DaemonConfig) {
		p := newPod(t)
		d := p.daemon(cfg)
		if _, err := features(d); err != nil {
			t.Fatalf("vhost-user request: %v (%v)", err, d.Err())
		}
		// Nothing of the first is in the way of another.
		if _, err := features(p.daemon(cfg)); err != nil {
			t.Errorf("second daemon: %v", err)
		}
		pid := server(t, d)
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/root", pid))
		if err != nil || len(entries) != 0 {
			t.Errorf("the root of the daemon has %v, %v; want the empty share", entries, err)
		}
		mounts := podnstest.Mounts(t, fmt.Sprintf("/proc/%d", pid))
		if cfg.Sandbox == SandboxNamespace && len(mounts) != 1 {
			t.Errorf("the daemon has mounts %q; want the share alone", mounts)
		}
	})
}

func TestDaemonEnds(t *testing.T) {
	eachDaemon(t, func(t *testing.T, cfg DaemonConfig) {
		for _, tt := range []struct {
			name string
			end  func(p *pod, d *Daemon) error
			want string
		}{
			{name: "VMM is gone", end: func(_ *pod, d *Daemon) error { d.CloseSocket(); return nil }},
			{name: "Close", end: func(_ *pod, d *Daemon) error { return d.Close() }},
			{name: "pod is closed", end: func(p *pod, _ *Daemon) error { return p.ns.Close() }, want: "virtiofsd: killed"},
			{name: "killed", end: func(_ *pod, d *Daemon) error { return unix.Kill(d.Pid(), unix.SIGKILL) }, want: "virtiofsd: killed"},
		} {
			t.Run(tt.name, func(t *testing.T) {
				p := newPod(t)
				d := p.daemon(cfg)
				if _, err := features(d); err != nil {
					t.Fatalf("vhost-user request: %v (%v)", err, d.Err())
				}
				if err := d.Err(); err != nil {
					t.Errorf("Err() of a live daemon = %v; want nil", err)
				}
				pidfd, err := unix.PidfdOpen(server(t, d), 0)
				if err != nil {
					t.Fatal(err)
				}
				defer unix.Close(pidfd)
				if err := tt.end(p, d); err != nil {
					t.Fatal(err)
				}
				podnstest.Receive(t, "the end of the daemon", d.Done())
				if !podnstest.Readable(t, pidfd) {
					t.Error("the daemon's server did not end")
				}
				if got := fmt.Sprint(d.Err()); got != tt.want && !(tt.want == "" && d.Err() == nil) {
					t.Errorf("Err() = %s; want %q", got, tt.want)
				}
			})
		}
	})
}

func TestDaemonFailure(t *testing.T) {
	eachDaemon(t, func(t *testing.T, cfg DaemonConfig) {
		p := newPod(t)
		cfg.Sandbox = "nonsense"
		d := p.daemon(cfg)
		podnstest.Receive(t, "the end of the daemon", d.Done())
		err := d.Err()
		if err == nil || !strings.HasPrefix(err.Error(), "virtiofsd: exit status ") || len(err.Error()) < 30 {
			t.Errorf("Err() = %v; want the exit status and what the daemon says", err)
		}
		if strings.Contains(fmt.Sprint(err), "\n") {
			t.Errorf("Err() = %q; want one line", err)
		}
	})
}

func TestDaemonMissing(t *testing.T) {
	t.Setenv("PATH", "/nonexistent")
	_, err := findDaemon([]string{"/nonexistent/virtiofsd"})
	for _, want := range []string{"/nonexistent/virtiofsd", "package virtiofsd", "package qemu-system-common"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("FindDaemon() = %v; want %q in it", err, want)
		}
	}
	p := newPod(t)
	if _, err := StartDaemon(t.Context(), p.ns, DaemonConfig{Binary: "/nonexistent/virtiofsd", Share: p.Share}); err == nil || !strings.Contains(err.Error(), "package virtiofsd") {
		t.Errorf("StartDaemon(missing) = %v; want the package's name", err)
	}
	if d, err := StartDaemon(t.Context(), p.ns, DaemonConfig{Binary: "/bin/false", Share: p.Share}); err == nil {
		d.Close()
		t.Error("StartDaemon(/bin/false) = nil; want an error")
	}
}

func TestFindDaemonInPath(t *testing.T) {
	dir := t.TempDir()
	want := filepath.Join(dir, "virtiofsd")
	if err := os.WriteFile(want, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	if got, err := findDaemon([]string{"/nonexistent"}); got != want || err != nil {
		t.Errorf("FindDaemon() = %q, %v; want %q", got, err, want)
	}
	if got, err := findDaemon([]string{"/dev/null", want}); got != want || err != nil {
		t.Errorf("FindDaemon() = %q, %v; want %q", got, err, want)
	}
}

func BenchmarkDaemon(b *testing.B) {
	path, err := FindDaemon()
	if err != nil {
		b.Skip(err)
	}
	ns := podnstest.Open(b, podns.Config{})
	s, err := NewShare(ns, b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	for b.Loop() {
		d, err := StartDaemon(b.Context(), ns, DaemonConfig{Binary: path, Share: s})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := features(d); err != nil {
			b.Fatal(err)
		}
		d.Close()
	}
}
