#!/bin/bash
# Prints the folder that holds Docker's programs, dockerd, docker and
# docker-proxy, of Debian 13. Its Docker knows containerd 2, that of Debian 12
# does not, and runs on both. The packages are unpacked into the cache and not
# installed, so that no service starts. VMRT_UPDATE=1 looks for a newer version.
. "$(dirname "$0")/../guest/lib.sh"

# Part of the folder's name: raise it when fetch changes its meaning.
RECIPE=1
PACKAGES=(docker.io docker-cli)

# fetch makes the folder for the newest version.
fetch() {
	local tmp=$CACHE/build/docker version out deb program
	private_apt
	version=$(candidate "${PACKAGES[0]}")
	out=$CACHE/docker-$RECIPE-$version
	if [[ ! -d $out ]]; then
		rm -rf "$tmp"
		mkdir -p "$tmp"/{debs,root,bin}
		say "downloading Docker (30 MB)"
		retry_updated download "$tmp/debs" || die "download ${PACKAGES[*]}"
		for deb in "$tmp"/debs/*.deb; do dpkg-deb -x "$deb" "$tmp/root"; done
		for program in usr/sbin/dockerd usr/sbin/docker-proxy usr/bin/docker; do
			mv "$tmp/root/$program" "$tmp/bin/"
		done
		# With the machine's own libraries.
		"$tmp/bin/dockerd" --version >&2 && "$tmp/bin/docker" --version >&2 || die "Docker $version does not run here"
		rm -rf "$out"
		mv "$tmp/bin" "$out"
		rm -rf "$tmp"
	fi
	touch "$out"
}

download() { (cd "$1" && apt-get download -q "${PACKAGES[@]}" >&2); }

have_fetched "$CACHE/docker-$RECIPE-" Docker
echo "$have"
