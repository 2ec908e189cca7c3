package env

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"
)

// snapshot is what exists inside an environment, each thing described by one
// line: "process 12 sleep 100", "mount tmpfs /run/x", "file /run/vmrt/x", ….
type snapshot map[string]bool

// leftoverTimeout is how long things may take to go away by themselves:
// containerd cleans up in the background.
const leftoverTimeout = 10 * time.Second

// Leftovers returns what exists inside beyond what was there right after the
// start: processes, mounts, network interfaces and namespaces, cgroups, and
// files below /run and in containerd's folders of running tasks. It waits for
// up to 10 s, or until ctx ends, for there to be nothing.
//
// The containers of the test must have been removed. Content that containerd
// keeps on purpose (images, snapshots) is not looked at.
func (e *Env) Leftovers(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, leftoverTimeout)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		now, err := e.snapshot()
		if err != nil {
			return nil, fmt.Errorf("look for leftovers: %w", err)
		}
		var more []string
		for item := range now {
			if !e.baseline[item] {
				more = append(more, item)
			}
		}
		sort.Strings(more)
		if len(more) == 0 {
			return nil, nil
		}
		select {
		case <-tick.C: // no event tells that a cgroup or a file is gone
		case <-ctx.Done():
			return more, nil
		}
	}
}

func (e *Env) snapshot() (snapshot, error) {
	s := snapshot{}
	for _, add := range []func(snapshot) error{
		e.addProcesses, e.addMounts, e.addNetwork, e.addFiles, e.addCgroups,
	} {
		if err := add(s); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// addProcesses lists every process of the PID namespace but its init, init's
// helper and containerd.
func (e *Env) addProcesses(s snapshot) error {
	proc := e.Path("/proc")
	entries, err := os.ReadDir(proc)
	if err != nil {
		return err
	}
	for _, d := range entries {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == 1 {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join(proc, d.Name(), "cmdline"))
		if err != nil {
			continue // it ended
		}
		stat, err := os.ReadFile(filepath.Join(proc, d.Name(), "stat"))
		if err != nil {
			continue
		}
		args := strings.TrimRight(string(bytes.ReplaceAll(cmdline, []byte{0}, []byte(" "))), " ")
		if strings.HasPrefix(args, "containerd --config "+e.configPath()) {
			continue
		}
		if args == "" { // a zombie: name it by its short name
			args = string(stat)
		}
		s[fmt.Sprintf("process %d %s", pid, args)] = true
	}
	return nil
}

// addMounts lists the mounts of the mount namespace.
func (e *Env) addMounts(s snapshot) error {
	f, err := os.Open(e.Path("/proc/1/mountinfo"))
	if err != nil {
		return err
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		before, after, _ := strings.Cut(sc.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		// Docker names the host's network once and for all.
		if len(left) >= 5 && len(right) >= 1 && left[4] != filepath.Join(e.dockerDir(), "exec", "netns", "default") {
			s[fmt.Sprintf("mount %s %s %s", left[0], right[0], left[4])] = true
		}
	}
	return sc.Err()
}

// addNetwork lists the interfaces of the network namespace. Bridges stay: CNI
// never removes its own.
func (e *Env) addNetwork(s snapshot) error {
	entries, err := os.ReadDir(e.Path("/sys/class/net"))
	if err != nil {
		return err
	}
	for _, d := range entries {
		if _, err := os.Stat(e.Path("/sys/class/net/" + d.Name() + "/bridge")); err == nil {
			continue
		}
		s["interface "+d.Name()] = true
	}
	return nil
}

// addFiles lists what lies below /run and where containerd keeps the bundles
// of tasks and sandboxes.
func (e *Env) addFiles(s snapshot) error {
	roots := []string{"/run"}
	for _, dir := range []string{"state", "root"} {
		for _, plugin := range []string{"io.containerd.runtime.v2.task", "io.containerd.sandbox.controller.v1.shim"} {
			roots = append(roots, filepath.Join(e.Dir, dir, plugin))
		}
	}
	for _, root := range roots {
		err := filepath.WalkDir(e.Path(root), func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) { // never made, or removed while we look
				return nil
			}
			if err != nil {
				return err
			}
			inside := strings.TrimPrefix(path, e.Path(""))
			if e.kept(inside, d.IsDir()) {
				return nil
			}
			item := "file " + inside
			s[item] = true
			if d.IsDir() && e.baseline != nil && !e.baseline[item] {
				return fs.SkipDir // one line says enough
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// kept tells what runtimes, containerd and its clients make once and keep:
// folders that are empty now, and what was found out about the host.
func (e *Env) kept(inside string, dir bool) bool {
	// nerdctl leaves the name of a process that it has ended, with every runtime.
	patterns := []string{"/run/vmrt/.cache/*", "/run/nerdctl/*/*/port-reserver.pid"}
	if dir {
		patterns = []string{
			"/run", "/run/nerdctl", "/run/nerdctl/*", "/run/nerdctl/*/*", "/run/vmrt", "/run/vmrt/.cache", "/run/containerd", "/run/containerd/*", "/run/containerd/runc/*",
			e.Dir + "/*/io.containerd.*", e.Dir + "/*/io.containerd.*/*", // */* is a containerd namespace
		}
	}
	for _, pattern := range patterns {
		if ok, _ := filepath.Match(pattern, inside); ok {
			return true
		}
	}
	return false
}

// addCgroups lists the cgroups made inside. The parent folder that containerd
// derives from a namespace's name stays by design.
func (e *Env) addCgroups(s snapshot) error {
	groups, err := e.cgroups.list()
	if err != nil {
		return err
	}
	for _, g := range groups {
		if strings.HasSuffix(g, ":/default") || strings.HasSuffix(g, ":/k8s.io") || strings.HasSuffix(g, ":/docker") {
			continue
		}
		s["cgroup "+g] = true
	}
	return nil
}
