package task

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	runc "github.com/containerd/go-runc"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/agent/stdio"
)

// Monitor starts the OCI runtime's commands. It gives the ones that make a
// process that process's own pipes. The task service would copy through two
// pipes instead of one, in 32 KiB pieces: without hardware virtualisation that
// is a third of the speed.
//
// It must be put into go-runc's Monitor variable before the first request.
type Monitor struct {
	runc.ProcessMonitor
	service *Service
	uid     int
	gid     int
}

// NewMonitor returns a monitor that starts processes by inner, for s. The
// streams are uid's and gid's: the root of a user namespace cannot give those
// of anybody outside to the container's user.
func NewMonitor(inner runc.ProcessMonitor, s *Service, uid, gid uint32) *Monitor {
	return &Monitor{inner, s, int(uid), int(gid)}
}

// Start starts cmd.
func (m *Monitor) Start(cmd *exec.Cmd) (chan runc.Exit, error) {
	return m.start(cmd, m.ProcessMonitor.Start)
}

// StartLocked starts cmd from a thread that lasts as long as the call.
func (m *Monitor) StartLocked(cmd *exec.Cmd) (chan runc.Exit, error) {
	return m.start(cmd, m.ProcessMonitor.StartLocked)
}

func (m *Monitor) start(cmd *exec.Cmd, start func(*exec.Cmd) (chan runc.Exit, error)) (chan runc.Exit, error) {
	k, ok := commandProcess(cmd.Args)
	if !ok {
		return start(cmd)
	}
	p := m.service.stdio(k)
	if p == nil || p.Terminal() {
		return start(cmd)
	}
	// A stream that is missing becomes /dev/null, which nil means.
	f := p.Files()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, nil, nil
	if f.Stdin != nil {
		cmd.Stdin = f.Stdin
	}
	if f.Stdout != nil {
		cmd.Stdout = f.Stdout
	}
	if f.Stderr != nil {
		cmd.Stderr = f.Stderr
	}
	defer p.Handed()
	if m.uid != 0 || m.gid != 0 {
		for _, file := range []*os.File{f.Stdin, f.Stdout, f.Stderr} {
			if file == nil {
				continue
			}
			if err := file.Chown(m.uid, m.gid); err != nil {
				return nil, fmt.Errorf("stdio of %s: %w", k, err)
			}
		}
	}
	return start(cmd)
}

// commandProcess returns the process that a command of the runtime makes:
//
//	crun … create --bundle BUNDLE … --pid-file BUNDLE/init.pid … ID
//	crun … exec --process FILE … --pid-file BUNDLE/EXEC.pid … ID
func commandProcess(args []string) (key, bool) {
	i := slices.Index(args, "--pid-file")
	if i < 0 || i+1 >= len(args) {
		return key{}, false
	}
	dir, file := filepath.Split(args[i+1])
	k := key{id: args[len(args)-1]}
	if filepath.Clean(dir) != api.BundlePath(k.id) {
		return key{}, false
	}
	switch {
	case follows(args, "create", "--bundle"):
		return k, true
	case follows(args, "exec", "--process"):
		k.exec = strings.TrimSuffix(file, ".pid")
		return k, true
	}
	return key{}, false
}

// follows reports whether b comes right after a.
func follows(args []string, a, b string) bool {
	i := slices.Index(args, b)
	return i > 0 && args[i-1] == a
}

// stdio returns what a process is given, nil if it is unknown.
func (s *Service) stdio(k key) *stdio.Process {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.processes[k]; p != nil {
		return p.stdio
	}
	return nil
}
