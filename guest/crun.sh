#!/bin/bash
# Builds crun, the OCI runtime within the guest, statically linked from
# Debian's source package, and prints the folder that holds it: crun, version.
#
# Of the source package only the upstream archive is used, with the patches in
# crun/. It is a release, so it needs no autotools and brings libocispec and yajl
# along.
. "$(dirname "$0")/lib.sh"

# How it is built; part of the cache's key. What loads other programs
# (checkpointing, WebAssembly) cannot be linked statically and has no use in the
# guest; nor has systemd.
OPTIONS='--quiet --disable-systemd --disable-criu --disable-dl --disable-libcrun
	--enable-embedded-yajl --disable-dependency-tracking'
FLAGS='-Os -flto -ffunction-sections -fdata-sections'
LINK='-all-static -Os -flto -Wl,--gc-sections'
PATCHES=("$GUEST"/crun/*.patch)

main() {
	local inputs have version out
	inputs=$(input_hash "$OPTIONS $FLAGS $LINK" "${PATCHES[@]}")
	have=$(newest "$CACHE/crun-$inputs-"*)
	if [[ $have && -z ${VMRT_UPDATE:-} ]]; then
		echo "$have"
		return
	fi
	lock crun
	need gcc make libc6-dev linux-libc-dev libseccomp-dev libcap-dev patch pkg-config python3
	private_apt
	version=$(apt-cache showsrc --only-source crun | sed -n 's/^Version: //p' | sort -V | tail -n 1)
	[[ $version ]] || die "no source package crun in $SOURCE_SUITE"
	out=$CACHE/crun-$inputs-$version
	[[ -d $out ]] || build "$version" "$out"
	touch "$out"
	echo "$out"
}

# build VERSION OUT
build() {
	local tmp=$CACHE/build/crun log=$CACHE/build/crun.log p feature
	rm -rf "$tmp"
	mkdir -p "$tmp/out" "$tmp/src"
	say "downloading the source of crun $1"
	(cd "$tmp" && apt-get source -qq --tar-only --download-only "crun=$1" >&2) || die "download the source of crun $1"
	tar -C "$tmp/src" --strip-components=1 -xf "$tmp"/crun_*.orig.tar.*
	for p in "${PATCHES[@]}"; do
		patch -s -d "$tmp/src" -p1 <"$p" >&2 || die "patch ${p##*/} does not apply to crun $1"
	done
	say "building crun on $(nproc) CPUs: about 1 minute of CPU time"
	(
		cd "$tmp/src"
		export CFLAGS="$FLAGS -ffile-prefix-map=$PWD=crun" LC_ALL=C
		nice ./configure $OPTIONS
		nice make -j"$(nproc)" LDFLAGS="$LINK"
	) >"$log" 2>&1 || {
		tail -n 20 "$log" >&2
		die "build of crun $1, see $log"
	}
	strip -s -o "$tmp/out/crun" "$tmp/src/crun"
	for feature in +SECCOMP +CAP +EBPF; do
		"$tmp/out/crun" --version | grep -qF -- "$feature" || die "crun $1 was built without $feature"
	done
	echo "${1%-*}" >"$tmp/out/version"
	chmod -R a+rX "$tmp/out"
	mv "$tmp/out" "$2"
	rm -rf "$tmp"
}

main "$@"; exit
