// Package userns gives the virtual machine of a pod with a user namespace
// namespaces that belong to it. A container's root has power over a network,
// ipc or uts namespace only if the namespace was made in its user namespace, or
// below (user_namespaces(7)), and the machine's first ones are not.
//
// So the agent makes a second set at boot, puts the machine's network devices
// into it, and begins anew in its network namespace, in which everything that
// has to do with the network is then right by itself. The agent stays outside
// the user namespace.
//
// All of it is for PID 1 of a fresh virtual machine, and runs once.
package userns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/agent/network"
	"github.com/vmrt/vmrt/pkg/agent/pause"
	"github.com/vmrt/vmrt/pkg/idmap"
)

// argument is the agent's first argument once it has begun anew. The second is
// the pid of the first process of the pid namespace. The kernel passes none.
const argument = "in-user-namespace"

// Init returns the first process of the pid namespace that belongs to the
// pod's user namespace, or nil if there is no user namespace, or not yet.
func Init() (*os.Process, error) {
	if len(os.Args) != 3 || os.Args[1] != argument {
		return nil, nil
	}
	pid, err := strconv.Atoi(os.Args[2])
	if err != nil {
		return nil, fmt.Errorf("first process of the pod's pid namespace: %w", err)
	}
	return os.FindProcess(pid)
}

// Enter makes the namespaces, keeps them as files of api.PodNamespaces, and
// starts the agent's program again in the network namespace. It returns only
// with an error.
func Enter(m idmap.Mapping) error {
	runtime.LockOSThread() // which changes its network namespace; exec ends all others
	return fmt.Errorf("make user namespace: %w", enter(m))
}

func enter(m idmap.Mapping) error {
	first, err := Make(m, api.PodNamespaces)
	if err != nil {
		return err
	}
	netns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", first))
	if err != nil {
		return err
	}
	if err := network.MoveHardware(netns); err != nil {
		return err
	}
	if err := unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	if err := remountSys(); err != nil {
		return err
	}
	err = unix.Exec("/proc/self/exe", []string{os.Args[0], argument, strconv.Itoa(first)}, os.Environ())
	return &os.PathError{Op: "exec", Path: "/proc/self/exe", Err: err}
}

// Make makes a user namespace and those that belong to it, keeps all but the
// network namespace as files of the folder dir, and returns the pid of the
// first process in them. After an error whatever was made stays.
func Make(m idmap.Mapping, dir string) (first int, err error) {
	if err := m.Check(); err != nil {
		return 0, err
	}
	if first, err = start(m, filepath.Dir(dir)); err != nil {
		return 0, err
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return 0, err
	}
	for _, kind := range []string{"user", "ipc", "uts", "pid"} {
		if err := Keep(fmt.Sprintf("/proc/%d/ns/%s", first, kind), filepath.Join(dir, kind)); err != nil {
			return 0, err
		}
	}
	return first, nil
}

// start starts a first process in new namespaces and returns its pid. dir is for
// pause.Start.
func start(m idmap.Mapping, dir string) (pid int, err error) {
	attr := syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWPID,
		// The namespace's root, whom ps shows as such.
		Credential:  &syscall.Credential{},
		UidMappings: extents(m.UIDs), GidMappings: extents(m.GIDs), GidMappingsEnableSetgroups: true,
	}
	err = pause.Start(dir, attr, func(cmd *exec.Cmd) error {
		err := cmd.Start()
		if err == nil {
			pid = cmd.Process.Pid
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("start the first process: %w", err)
	}
	return pid, nil
}

func extents(list []specs.LinuxIDMapping) (out []syscall.SysProcIDMap) {
	for _, e := range list {
		out = append(out, syscall.SysProcIDMap{ContainerID: int(e.ContainerID), HostID: int(e.HostID), Size: int(e.Size)})
	}
	return out
}

// Keep binds a namespace to a file, which it makes.
func Keep(source, target string) error {
	f, err := os.OpenFile(target, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("keep namespace %s: %w", filepath.Base(target), err)
	}
	return nil
}

// remountSys mounts sysfs, which shows the devices of the network namespace it
// was mounted in, once more, with what is mounted in it.
func remountSys() error {
	const sys, cgroups, flags = "/sys", "/sys/fs/cgroup", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	old, err := unix.OpenTree(unix.AT_FDCWD, cgroups, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("copy mount of %s: %w", cgroups, err)
	}
	defer unix.Close(old)
	err = errors.Join(
		unix.Unmount(cgroups, unix.MNT_DETACH),
		unix.Unmount(sys, unix.MNT_DETACH),
		unix.Mount("sysfs", sys, "sysfs", flags, ""),
		unix.MoveMount(old, "", unix.AT_FDCWD, cgroups, unix.MOVE_MOUNT_F_EMPTY_PATH))
	if err != nil {
		return fmt.Errorf("mount %s anew: %w", sys, err)
	}
	return nil
}
