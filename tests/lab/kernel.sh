#!/bin/bash
# Takes the kernel of the nested machine from Debian's generic kernel package,
# which has KVM and vhost-vsock as modules (the cloud flavour has no KVM),
# without installing it. Prints the folder that holds it: vmlinuz and modules/,
# a /lib/modules/<release> folder.
. "$(dirname "$0")/../../guest/lib.sh"

META=linux-image-amd64

. /etc/os-release
have=$(newest "$CACHE/kernel-lab-$VERSION_CODENAME-"*)
if [[ $have && -z ${VMRT_UPDATE:-} ]]; then
	echo "$have"
	exit
fi

lock "nested machine's kernel"
[[ $(machine_sources) && -z ${VMRT_UPDATE:-} ]] || apt-get update -q >&2

# image: the package with the kernel that the meta package stands for now.
image() {
	LC_ALL=C apt-cache depends "$META" | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1
}

package=$(image)
[[ $package ]] || die "no package $META among the machine's package sources"
tmp=$CACHE/build/lab
rm -rf "$tmp"
mkdir -p "$tmp/deb" "$tmp/out"
say "downloading $package"
download() { (cd "$tmp" && apt-get download -q -o APT::Sandbox::User=root "$(image)" >&2); }
retry_updated download
out=$CACHE/kernel-lab-$VERSION_CODENAME-$(dpkg-deb -f "$tmp"/*.deb Version)
dpkg-deb -x "$tmp"/*.deb "$tmp/deb"
mv "$tmp"/deb/boot/vmlinuz-* "$tmp/out/vmlinuz"
for m in "$tmp"/deb/lib/modules/* "$tmp"/deb/usr/lib/modules/*; do mv "$m" "$tmp/out/modules"; done # /usr on Debian 13
chmod -R a+rX "$tmp/out"
rm -rf "$out"
mv "$tmp/out" "$out"
rm -rf "$tmp"
echo "$out"
