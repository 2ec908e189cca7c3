#!/bin/bash
# Takes the stock guest kernel from the cloud kernel package of the machine's
# Debian release, without installing it, and prints the folder that holds it:
# vmlinux (unpacked from the package's vmlinuz, entered by PVH), config,
# release (uname -r), version (of the package) and its modules below
# lib/modules.
. "$(dirname "$0")/lib.sh"

META=linux-image-cloud-amd64

main() {
	local codename have
	codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
	have=$(newest "$CACHE/kernel-stock-$codename-"*)
	if [[ -z $have || ${VMRT_UPDATE:-} ]]; then
		lock "stock kernel"
		need lz4 xz-utils zstd
		[[ $(machine_sources) && -z ${VMRT_UPDATE:-} ]] || apt_update
		get "$CACHE/kernel-stock-$codename"
		have=$(newest "$CACHE/kernel-stock-$codename-"*)
	fi
	echo "$have"
}

# get PREFIX: downloads the package and makes the folder PREFIX-VERSION.
get() {
	local tmp=$CACHE/build/stock out m
	[[ $(image) ]] || die "no package $META among the machine's package sources"
	rm -rf "$tmp"
	mkdir -p "$tmp"/{deb,out/lib}
	retry_updated download "$tmp" || die "download the kernel of $META"
	out=$1-$(dpkg-deb -f "$tmp"/*.deb Version)
	if [[ ! -d $out ]]; then
		dpkg-deb -x "$tmp"/*.deb "$tmp/deb"
		unpack_bzimage "$tmp"/deb/boot/vmlinuz-* >"$tmp/out/vmlinux"
		# Debian 13 has /usr/lib/modules.
		for m in "$tmp"/deb/lib/modules "$tmp"/deb/usr/lib/modules; do
			[[ ! -d $m ]] || mv "$m" "$tmp/out/lib/"
		done
		cp "$tmp"/deb/boot/config-* "$tmp/out/config"
		ls "$tmp/out/lib/modules" >"$tmp/out/release"
		dpkg-deb -f "$tmp"/*.deb Version >"$tmp/out/version"
		chmod -R a+rX "$tmp/out"
		mv "$tmp/out" "$out"
	fi
	touch "$out"
	rm -rf "$tmp"
}

# image: the package with the kernel that the meta package stands for now.
image() {
	LC_ALL=C apt-cache depends "$META" | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1
}

download() {
	say "downloading $(image) (30 MB)"
	(cd "$1" && apt-get download -q -o APT::Sandbox::User=root "$(image)" >&2)
}

# number FILE OFFSET BYTES: a little-endian number in FILE.
number() { od -An -v -j "$2" -N "$3" -t "u$3" --endian=little "$1" | tr -d ' '; }

# unpack_bzimage FILE: the ELF kernel within a bzImage. The header's fields are
# those of Documentation/arch/x86/boot.rst: setup_sects, payload_offset and
# payload_length; the payload ends with four bytes of its unpacked size.
unpack_bzimage() {
	local start magic
	start=$((($(number "$1" 0x1f1 1) + 1) * 512 + $(number "$1" 0x248 4)))
	magic=$(od -An -v -j "$start" -N 4 -t x1 "$1" | tr -d ' ')
	dd if="$1" skip="$start" count="$(($(number "$1" 0x24c 4) - 4))" bs=64k \
		iflag=skip_bytes,count_bytes status=none | case $magic in
	02214c18) lz4 -dcq ;;
	fd377a58) xz -dc ;;
	28b52ffd) zstd -dcq ;;
	1f8b*) gzip -dc ;;
	*) die "$1: kernel compressed in an unknown way ($magic)" ;;
	esac
}

main "$@"; exit
