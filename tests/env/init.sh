# PID 1 of an environment, before the cgroup mounts. $1 is the environment's
# folder; RESOLV_CONF is the resolver's file when it lies below /run.
mount --make-rprivate /
mount -t proc -o nosuid,nodev,noexec proc /proc
resolv=
if [ -n "$RESOLV_CONF" ]; then resolv=$(cat "$RESOLV_CONF"); fi
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/lock /run/netns
if [ -n "$RESOLV_CONF" ]; then
	mkdir -p "${RESOLV_CONF%/*}"
	printf '%s\n' "$resolv" >"$RESOLV_CONF"
fi
mount -t overlay -o "lowerdir=/var/lib,upperdir=$1/var-lib,workdir=$1/var-lib-work" var-lib /var/lib
# A new sysfs shows the network of the process that mounts it.
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
ip link set lo up
