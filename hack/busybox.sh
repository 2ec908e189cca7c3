#!/bin/bash
# Prints the path of Debian's dynamically linked busybox, of the machine's own
# release. It cannot be installed beside busybox-static, so its package is
# unpacked into the cache. Its shell runs /bin/ls for ls, where that of
# busybox-static runs its own, which tests of masked paths tell apart.
. "$(dirname "$0")/../guest/lib.sh"

main() {
	local codename dir tmp
	codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
	dir=$CACHE/busybox-$codename
	[[ -x $dir/bin/busybox ]] || lock "busybox"
	if [[ ! -x $dir/bin/busybox ]]; then # and no other build has made it meanwhile
		[[ $(machine_sources) ]] || apt_update
		tmp=$CACHE/build/busybox
		rm -rf "$tmp" "$dir"
		mkdir -p "$tmp/out"
		say "downloading busybox"
		retry_updated download "$tmp" || die "download the package busybox"
		dpkg-deb -x "$tmp"/*.deb "$tmp/out"
		# Debian 13 has /usr/bin.
		[[ -e $tmp/out/bin ]] || ln -s usr/bin "$tmp/out/bin"
		mv "$tmp/out" "$dir"
		rm -rf "$tmp"
	fi
	echo "$dir/bin/busybox"
}

download() { (cd "$1" && apt-get download -q -o APT::Sandbox::User=root busybox >&2); }

main
