#!/bin/bash
# Takes the QEMU and the virtiofsd of a Debian release, with every library that
# they need, without installing them:
#
#	tests/vmm.sh bookworm|trixie [COMMAND...]
#
# It prints the folder that holds them. With a command it runs that where the
# folder is mounted at /mnt/RELEASE, which alone the programs run at: they name
# their loader and libraries by it, since those of another release do not mix
# with the machine's own. The mount is in a namespace of the command's;
# $VMRT_QEMU and $VMRT_VIRTIOFSD name the programs.
. "$(dirname "$0")/../guest/lib.sh"

# Part of the folder's name: raise it when extract changes its meaning.
RECIPE=1
RELEASE=${1:-}
case $RELEASE in
bookworm) packages=(qemu-system-x86 qemu-system-common) virtiofsd=usr/lib/qemu/virtiofsd ;;
trixie) packages=(qemu-system-x86 virtiofsd) virtiofsd=usr/libexec/virtiofsd ;;
*) die "release '$RELEASE': want bookworm or trixie" ;;
esac
shift
qemu=bin/qemu-system-x86_64
at=/mnt/$RELEASE

main() {
	local have
	have_fetched "$CACHE/vmm-$RELEASE-$RECIPE-" "QEMU of $RELEASE"
	if (($#)); then
		VMRT_QEMU=$at/$qemu VMRT_VIRTIOFSD=$at/$virtiofsd mounted "$have" "$@"
	else
		echo "$have"
	fi
}

# mounted FOLDER COMMAND...
mounted() {
	unshare --mount --propagation private bash -c '
		set -e
		mount -t tmpfs -o mode=755 vmm "${1%/*}"
		mkdir "$1"
		mount --bind "$2" "$1"
		shift 2
		exec "$@"' mounted "$at" "$@"
}

# fetch makes the folder for the newest version.
fetch() {
	local tmp=$CACHE/build/vmm-$RELEASE deb version out
	need patchelf
	SOURCE_SUITE=$RELEASE
	[[ $RELEASE == trixie ]] || APT_DIR=$CACHE/apt-$RELEASE
	private_apt
	version=$(candidate qemu-system-x86)
	out=$CACHE/vmm-$RELEASE-$RECIPE-${version#*:} # without the epoch
	if [[ ! -d $out ]]; then
		rm -rf "$tmp"
		mkdir -p "$tmp"/{debs/partial,root/usr/lib,root/usr/lib64}
		ln -s usr/lib usr/lib64 "$tmp/root/"
		say "downloading QEMU and virtiofsd of $RELEASE (50 MB)"
		# As if nothing was installed, so that nothing is left out.
		retry_updated apt-get install -y -qq --download-only --no-install-recommends \
			-o Dir::State::status=/dev/null -o Dir::Cache::archives="$tmp/debs" "${packages[@]}" >&2
		for deb in "$tmp"/debs/*.deb; do
			dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$tmp/root" --keep-directory-symlink --no-same-owner \
				--exclude='./usr/share/doc' --exclude='./usr/share/locale' --exclude='./usr/share/man' --exclude='./dev'
		done
		relocate "$tmp/root"
		rm -rf "$out"
		mv "$tmp/root" "$out"
		rm -rf "$tmp"
	fi
	touch "$out"
}

# relocate FOLDER: has the programs load everything from below $at, and checks
# that they run there with nothing of the machine's. Debian's QEMU does not
# look for its data beside itself, so it is started through a script.
relocate() {
	local program foreign lib=$at/usr/lib/x86_64-linux-gnu
	mkdir "$1/bin.new"
	cat >"$1/bin.new/qemu-system-x86_64" <<-END
		#!/bin/sh
		export QEMU_MODULE_DIR=$lib/qemu
		exec $at/usr/bin/qemu-system-x86_64 -L $at/usr/share/qemu -L $at/usr/share/seabios "\$@"
	END
	chmod 0755 "$1/bin.new/qemu-system-x86_64"
	rm -rf "$1/bin"
	mv "$1/bin.new" "$1/bin"
	for program in usr/bin/qemu-system-x86_64 "$virtiofsd"; do
		patchelf --set-interpreter "$at/usr/lib64/ld-linux-x86-64.so.2" \
			--force-rpath --set-rpath "$lib:$lib/pulseaudio" "$1/$program"
		foreign=$(mounted "$1" env LD_TRACE_LOADED_OBJECTS=1 "$at/$program" | grep -v -e " $at/" -e linux-vdso -e "^[[:space:]]*$at/" || true)
		[[ -z $foreign ]] || die "$program of $RELEASE does not run by itself: $foreign"
	done
	mounted "$1" sh -c '"$1" --version | head -n 1; "$2" --version' sh "$at/$qemu" "$at/$virtiofsd" >&2
}

main "$@"; exit
