#!/bin/bash
# Builds the tuned guest kernel from Debian's linux-source package and prints
# the folder that holds it: vmlinux (stripped, entered by PVH), config, release
# (uname -r), version (of the source package).
#
# The folder's name has a hash of the fragment, the patches and the recipe, then
# the source package's version. With -n nothing is built: no folder, no output.
# VMRT_KEEP_BUILD=1 keeps sources and objects, so that the next build after a
# change is a short one.
. "$(dirname "$0")/lib.sh"

SOURCE=linux-source-6.12
FRAGMENT=$GUEST/kernel.config.fragment
PATCHES=("$GUEST"/patches/*.patch)
# Part of the cache's key: raise the number when build changes its meaning. A
# build does not say where, when and by whom, so that the same inputs give the
# same file.
RECIPE='1 KBUILD_BUILD_USER=vmrt KBUILD_BUILD_HOST=vmrt KBUILD_BUILD_VERSION=1'
TIMESTAMP='1970-01-01 00:00:00 UTC'

main() {
	local inputs have version out
	inputs=$(input_hash "$RECIPE" "$FRAGMENT" "${PATCHES[@]}")
	have=$(newest "$CACHE/kernel-tuned-$inputs-"*)
	if [[ ($have && -z ${VMRT_UPDATE:-}) || ${1:-} == -n ]]; then
		[[ -z $have ]] || echo "$have"
		return
	fi
	lock "tuned kernel"
	need build-essential flex bison bc libelf-dev libssl-dev xz-utils
	private_apt
	version=$(candidate $SOURCE)
	out=$CACHE/kernel-tuned-$inputs-$version
	[[ -d $out ]] || build "$version" "$out"
	touch "$out"
	echo "$out"
}

# build VERSION OUT
build() {
	local src obj log=$CACHE/build/kernel.log tmp=$CACHE/build/kernel
	src=$CACHE/build/$SOURCE-$1
	obj=$src.obj
	[[ -d $src ]] && unpatch "$src" || fetch "$1" "$src"
	apply "$1" "$src"
	mkdir -p "$obj"
	configure "$1" "$src" "$obj"
	say "building the kernel on $(nproc) CPUs: about 14 minutes of CPU time"
	nice env ${RECIPE#* } KBUILD_BUILD_TIMESTAMP="$TIMESTAMP" LC_ALL=C \
		make -C "$src" O="$obj" -j"$(nproc)" vmlinux 2>&1 | progress kernel 2600 "$log" || {
		tail -n 20 "$log" >&2
		die "make of $SOURCE $1, see $log"
	}
	rm -rf "$tmp"
	mkdir -p "$tmp"
	strip -s -o "$tmp/vmlinux" "$obj/vmlinux"
	cp "$obj/.config" "$tmp/config"
	cp "$obj/include/config/kernel.release" "$tmp/release"
	echo "$1" >"$tmp/version"
	chmod 0644 "$tmp"/*
	mv "$tmp" "$2"
	[[ ${VMRT_KEEP_BUILD:-} ]] || rm -rf "$src" "$src".*
}

# fetch VERSION DIR: unpacks the source as DIR.
fetch() {
	local tmp=$CACHE/build/unpack
	rm -rf "$tmp" "$2" "$2".*
	mkdir -p "$tmp/deb"
	say "downloading $SOURCE $1 (150 MB)"
	(cd "$tmp" && apt-get download -q "$SOURCE=$1" >&2) || die "download $SOURCE $1"
	say "unpacking it"
	dpkg-deb -x "$tmp"/*.deb "$tmp/deb"
	tar -C "$tmp" -xf "$tmp/deb/usr/src/$SOURCE.tar.xz"
	mv "$tmp/$SOURCE" "$2"
	rm -rf "$tmp"
}

# apply VERSION DIR: patches the source, and keeps the patches beside it.
apply() {
	local p
	mkdir -p "$2.patches"
	for p in "${PATCHES[@]}"; do
		cp "$p" "$2.patches/"
		patch -s -d "$2" -p1 <"$p" || die "patch ${p##*/} does not apply to $SOURCE $1"
	done
}

# unpatch DIR: takes out what apply did to a source that was kept.
unpatch() {
	local patches=("$1.patches"/*) i
	for ((i = ${#patches[@]} - 1; i >= 0; i--)); do
		patch -s -R -f -d "$1" -p1 <"${patches[i]}" >&2 || return
		rm "${patches[i]}"
	done
}

# configure VERSION SRC OBJ: the fragment and nothing else. A line of it that
# does not hold is told: stable releases do rename options.
configure() {
	local lost
	make -s -C "$2" O="$3" KCONFIG_ALLCONFIG="$FRAGMENT" allnoconfig >&2
	lost=$(grep -E '^CONFIG_' "$FRAGMENT" | grep -vxFf "$3/.config" || true)
	[[ -z $lost ]] || say "WARNING: kernel $1 does not know or accept:" $lost
}

main "$@"; exit
