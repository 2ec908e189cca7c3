// Package guestspec turns the OCI runtime spec that containerd wrote for a
// container on the host into the spec that the OCI runtime in the virtual
// machine runs, and says what the host has to do for it: which files to share,
// which hooks to run, which network to join.
//
// The functions are pure: they read nothing but their arguments (Load apart),
// never change their input, and may be called from any goroutine. Nothing is
// promised about what the host's paths are or whether they exist; the caller
// finds that out when it shares them. The only host paths in the guest's spec
// are those below /dev, /proc and /sys, where they mean the guest's own files.
//
// A feature that cannot be had is an error of kind errdefs.ErrNotImplemented
// when leaving it out would change what the container may do or sees, and a
// warning otherwise. Malformed input is errdefs.ErrInvalidArgument, in runc's
// words where runc has some.
//
// # Namespaces
//
//   - mount: a new one is required.
//   - pid, ipc, uts, cgroup: a new one, or none, which means the virtual
//     machine's own and never the host's. A container that is not privileged
//     always gets a cgroup namespace, so that it sees its own cgroup alone.
//   - network: always that of the agent, the guest's only one in use, named by
//     path so that net.* sysctls are permitted. The spec's path (or that a new
//     one is wanted) is in Plan.NetNS. A spec without a network namespace asks
//     for the host's network: Plan.HostNetwork. Its container has none in the
//     guest either, and may not set net.* sysctls.
//   - time: a new one, with its offsets.
//   - user: the one that was made when the virtual machine booted, with
//     Input.IDs, and of which its other namespaces are. Other ids are an
//     error; ids outside it are the host's, as are the owners of shared files.
//   - any of them by path: the guest's namespace that Input.PodNamespaces
//     names, else an error: a process outside the virtual machine has no
//     namespace in it.
//
// # Mounts
//
//   - A mount is a bind mount when its type is "bind" or its options have
//     "bind" or "rbind". Its source is in Plan.Binds, and in the guest it is
//     SharePath.
//   - Sources /dev, /proc and /sys, and below them, are the guest's own files.
//     What is below /dev/shm is data and shared. A source below /dev must be
//     present in the guest; /proc/<pid> never is.
//   - tmpfs, proc, sysfs, devpts, mqueue, cgroup and other file systems
//     without a source are kept with their options. Those on a device or a
//     server (ext4, nfs, overlay …) are errors.
//   - shared and rshared on a bind mount are errors, since no mount made in
//     the guest reaches the host; slave and rslave are kept, and the host
//     shares later mounts too. rro is kept and enforced on both sides.
//   - idmap, ridmap and a mount's own ids are for the host, which maps the
//     owners before the guest sees them: Bind.IDs.
//   - SELinux's context options are dropped.
//
// # Devices
//
//   - Linux.Devices are devices of the host. Those that stand for a function
//     of any kernel (/dev/fuse, /dev/net/tun, /dev/null …) become the guest's
//     own, with its numbers; all others are errors.
//   - A privileged container, one with access to all devices and
//     CAP_SYS_ADMIN, gets the guest's devices instead of the host's.
//   - Cgroup device rules are kept, renumbered with their devices.
//
// # Resources
//
//   - Memory limit, reservation and swap, CPU shares, quota, period, burst and
//     idle, pids, and unified keys of the cgroup, cpu, memory and pids
//     controllers are kept.
//   - The host's topology means nothing in the guest: cpuset, memoryPolicy and
//     execCPUAffinity are dropped. So are block I/O, RDMA, huge page and
//     network limits, and what cgroup v2 does not have.
//   - cgroupsPath is /vmrt/<id> in the guest.
//
// # Process
//
//   - User, groups, umask, arguments, environment, directory, capabilities,
//     no_new_privs, rlimits, OOM score, terminal, scheduler and I/O priority
//     are kept. AppArmor and SELinux labels are dropped.
//
// # Hooks
//
//   - prestart, createRuntime, poststart and poststop belong to the runtime's
//     namespaces (OCI runtime-spec 1.3, config.md, "POSIX-platform Hooks"):
//     they are in Plan.Hooks, for the host. startContainer belongs to the
//     container's and is kept. createContainer, whose program is on the host
//     and whose namespaces are in the guest, is an error.
//
// # The rest
//
//   - seccomp is kept whole, with one rule more that does nothing and has a
//     hash of the rest; one with a listener is an error. sysctl,
//     maskedPaths, readonlyPaths, rootfsPropagation, personality, hostname
//     and domainname are kept. intelRdt and netDevices are errors.
//   - Annotations are dropped: OCI runtimes act on some of them.
//   - ociVersion is 1.0.2, which every version of crun takes.
//   - Sections of other platforms are dropped, as runc does.
package guestspec
