// Package halt ends the virtual machine: processes, file systems, power. It
// is for PID 1 only.
package halt

import (
	"context"
	"os"
	"slices"
	"time"

	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

const (
	// termGrace is what processes get between SIGTERM and SIGKILL. Those that
	// a container's owner cares for were stopped before.
	termGrace = 300 * time.Millisecond
	// killGrace bounds the wait for killed processes to be reaped.
	killGrace = 2 * time.Second
	// syncGrace bounds what a hung file system can delay.
	syncGrace = 5 * time.Second
)

// PowerOff ends every process, unmounts, syncs and ends the machine. It does
// not return. reaped must deliver a value whenever children were reaped.
func PowerOff(reaped <-chan struct{}) {
	endProcesses(reaped)
	bounded(syncGrace, func() {
		unix.Sync()
		unmountAll()
		unix.Sync()
	})
	Now()
}

// Now ends the machine at once. The kernel runs with reboot=t, and a reset is
// what every VMM turns into the end of its process; microvm has no other way.
func Now() {
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	log.L.WithError(err).Error("reboot")
	os.Exit(1) // the end of PID 1 makes the kernel panic, and that a reset
}

// bounded returns when f has, or after d.
func bounded(d time.Duration, f func()) {
	done := make(chan struct{})
	go func() { f(); close(done) }()
	select {
	case <-done:
	case <-time.After(d):
		log.L.Errorf("file systems are not unmounted after %v", d)
	}
}

func endProcesses(reaped <-chan struct{}) {
	for _, step := range []struct {
		signal unix.Signal
		grace  time.Duration
	}{{unix.SIGTERM, termGrace}, {unix.SIGKILL, killGrace}} {
		if !children() {
			return
		}
		unix.Kill(-1, step.signal)
		if awaitNone(reaped, step.grace) {
			return
		}
	}
	log.L.Errorf("processes are left %v after SIGKILL", killGrace)
}

func awaitNone(reaped <-chan struct{}, grace time.Duration) bool {
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	for children() {
		select {
		case <-reaped:
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// children reports whether any process but kernel threads is left: each is,
// or becomes, a child of PID 1.
func children() bool {
	err := unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	return err != unix.ECHILD
}

// keep are file systems of the kernel that hold nothing to lose.
var keep = []string{"proc", "sysfs", "devtmpfs", "devpts", "cgroup2", "mqueue", "rootfs", "tmpfs", "ramfs"}

// unmountAll unmounts what can lose data, the last mount first. What is busy
// is detached, after the processes that kept it busy have gone.
func unmountAll() {
	infos, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		return slices.Contains(keep, i.FSType), false
	})
	if err != nil {
		log.L.WithError(err).Error("list mounts")
		return
	}
	for _, i := range slices.Backward(infos) {
		if unix.Unmount(i.Mountpoint, unix.UMOUNT_NOFOLLOW) == nil {
			continue
		}
		if err := unix.Unmount(i.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			log.L.WithError(err).Errorf("unmount %s", i.Mountpoint)
		}
	}
}
