#!/bin/bash
# Installs the Debian packages that a target of the Makefile needs and that the
# machine lacks, and says which:
#
#	hack/deps.sh build|demo|test...
#
# Packages come from the machine's own sources. Debian 12's Go is too old even
# to fetch a newer one; it comes from the backports of the mirror in use, with
# package lists of our own, so that nothing below /etc/apt changes.
. "$(dirname "$0")/../guest/lib.sh"

HACK=$(cd "$(dirname "$0")" && pwd)

# The packages by what they are for.
build=(ca-certificates)
demo=(busybox-static iproute2 kmod mount qemu-system-x86 util-linux)
# passt is for containers and pods with the host's network alone.
test=(cpio crun e2fsprogs erofs-utils gcc git iptables libc6-dev libseccomp-dev passt pkg-config procps qemu-utils tini)

# backports_lists: points apt at package lists of our own, which know the
# machine's sources and the backports of its release.
backports_lists() {
	local dir=$CACHE/apt-backports label uri codename
	mkdir -p "$dir"/{sources,lists/partial,archives/partial}
	[[ $(machine_sources) ]] || apt_update
	cp -r /etc/apt/sources.list /etc/apt/sources.list.d/. "$dir/sources/" 2>/dev/null || true
	[[ ! -e $dir/sources/sources.list ]] || mv "$dir/sources/sources.list" "$dir/sources/machine.list"
	while IFS='|' read -r label uri codename; do
		[[ $label == Debian && $codename == "$1" ]] || continue
		printf '%s\n' 'Types: deb' "URIs: $uri" "Suites: $1-backports" 'Components: main' \
			'Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg'
		break
	done < <(machine_sources) >"$dir/sources/vmrt-backports.sources"
	[[ -s $dir/sources/vmrt-backports.sources ]] || die "no Debian mirror among the machine's package sources"
	cat >"$dir/apt.conf" <<-EOF
		Dir::Etc::SourceList "/dev/null";
		Dir::Etc::SourceParts "$dir/sources";
		Dir::State::Lists "$dir/lists";
		Dir::Cache "$dir";
		APT::Sandbox::User "root";
	EOF
	export APT_CONFIG=$dir/apt.conf
	say "reading the package lists of $1-backports"
	apt_update
}

# install_go: a Go that can fetch the toolchain that go.mod asks for.
install_go() {
	local codename package
	"$HACK/bin/go" -path >/dev/null 2>&1 && return
	codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
	[[ $(id -u) == 0 ]] || die "run as root: Go is missing"
	[[ $codename != bookworm ]] || backports_lists "$codename"
	[[ $(apt-cache search --names-only '^golang-1\.[0-9]+-go$') ]] || apt_update
	# The newest golang-1.N-go.
	package=$(apt-cache search --names-only '^golang-1\.[0-9]+-go$' | awk '{print $1}' | sort -V | tail -n 1)
	[[ $package ]] || die "no Go among the package sources"
	need "$package"
	unset APT_CONFIG
	"$HACK/bin/go" -path >/dev/null
}

# need_virtiofsd: a package of its own since Debian 13. Before, QEMU's brings it,
# which is installed by now. The package lists do not tell: a new machine has none.
need_virtiofsd() { [[ -x /usr/lib/qemu/virtiofsd ]] || need virtiofsd; }

# `make -j` and other clones run this at the same time.
mkdir -p "$CACHE"
exec 6>"$CACHE/deps.lock"
flock 6

packages=()
for group; do
	case $group in
	build) packages+=("${build[@]}") ;;
	demo) packages+=("${build[@]}" "${demo[@]}") ;;
	test) packages+=("${build[@]}" "${demo[@]}" "${test[@]}") ;;
	*) die "$group: want build, demo or test" ;;
	esac
done
need "${packages[@]}"
[[ " ${packages[*]} " != *" qemu-system-x86 "* ]] || need_virtiofsd
install_go
