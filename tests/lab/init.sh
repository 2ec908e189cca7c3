#!/bin/busybox sh
# Init of the nested machine: makes the outer machine's files the root, under
# an overlay that forgets, runs /command there, and turns the machine off.
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs dev /dev
while read -r module; do
	$B insmod "/modules/$module" || echo "lab: insmod $module: exit code $?" >&2
done </modules/order

need() { "$@" || { echo "lab: $* failed" >&2; $B reboot -f; }; }

need $B mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=512000,cache=loose root /lower
need $B mount -t tmpfs upper /upper
$B mkdir /upper/files /upper/work
need $B mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work root /root
for d in proc sys dev; do need $B mount -o rbind "/$d" "/root/$d"; done
$B mkdir -p /root/dev/shm /root/dev/pts
need $B mount -t tmpfs shm /root/dev/shm
need $B mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /root/dev/pts
need $B mount -t cgroup2 cgroup2 /root/sys/fs/cgroup
need $B mount -t tmpfs -o mode=755 run /root/run
# Scratch files live on tmpfs: an overlay cannot hold another one's upper layer.
need $B mount -t tmpfs -o mode=1777 tmp /root/var/tmp
$B ip link set lo up
# As udev's rules on Debian have it.
if $B chroot /root chgrp kvm /dev/kvm; then $B chmod 0660 /dev/kvm; else $B chmod 0666 /dev/kvm; fi
$B chmod 0666 /dev/net/tun
$B hostname lab
cp_out() { [ ! -s /out ] || { d="/root$($B cat /out)"; $B mkdir -p "$d" && $B mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 out "$d"; }; }
need cp_out
$B cp /command $B /root/run/
$B cat >/root/run/init <<'END'
for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
	cpu=${cpu##*/cpu}
	/run/busybox taskset -c "$cpu" /run/busybox sh -c "while echo $cpu; do /run/busybox sleep 1; done" &
done </dev/null >/dev/vport0p3 2>&1
/bin/sh /run/command </dev/null >/dev/vport0p1 2>&1
echo $? >/dev/vport0p2
/run/busybox sync
/run/busybox reboot -f
END
# Not chroot: whoever enters a mount namespace leaves a chroot.
exec $B switch_root /root /bin/sh /run/init
