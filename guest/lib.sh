# Shared by the scripts beside it (bash). They are run as root on Debian 12 or
# 13, print the path of what they made on stdout and everything else on stderr.
#
# Results live outside the tree, below $CACHE, in a folder named after a hash
# of the inputs; a folder that exists is complete. VMRT_UPDATE=1 asks the
# archive for a newer source or binary package; without it whatever was built
# from the same inputs before is used, and nothing is fetched.

set -euo pipefail
shopt -s nullglob

GUEST=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export HOME=${HOME:-~} # cron and systemd do not set it
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/vmrt
# The release whose source packages are built, whatever the machine runs.
SOURCE_SUITE=trixie
# Where private_apt keeps its lists, one folder for each suite.
APT_DIR=$CACHE/apt

say() { printf '%s\n' "$*" >&2; }
die() { say "${0##*/}: $*"; exit 1; }

# lock NAME: at most one process works on NAME at a time.
lock() {
	mkdir -p "$CACHE"
	exec 9>"$CACHE/$1.lock"
	flock -n 9 || { say "waiting for another build of the $1"; flock 9; }
}

# input_hash TEXT FILE...: of the text, and of names and contents in the order
# given.
input_hash() {
	local f
	{
		printf '%s\n' "$1"
		shift
		for f; do printf '%s ' "${f##*/}"; sha256sum <"$f"; done
	} | sha256sum | cut -c1-12
}

# newest FOLDER...: the one that was made last, or nothing.
newest() {
	local d last=
	for d; do [[ -d $d && ( -z $last || $d -nt $last ) ]] && last=$d; done
	printf '%s' "$last"
}

# have_fetched PREFIX NAME: sets have to the newest folder whose name begins with
# PREFIX. Where there is none, or VMRT_UPDATE=1 asks for a newer one, the function
# fetch makes it, in a shell of its own, which keeps its apt configuration. Not to
# be called where bash ignores errors, as in $(…).
have_fetched() {
	have=$(newest "$1"*)
	if [[ -z $have || ${VMRT_UPDATE:-} ]]; then
		lock "$2"
		(fetch)
		have=$(newest "$1"*)
	fi
}

# need PACKAGE...: installs the Debian packages that are missing.
need() {
	local p missing=()
	for p; do
		[[ $(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null) == installed ]] || missing+=("$p")
	done
	((${#missing[@]})) || return 0
	[[ $(id -u) == 0 ]] || die "run as root, or install first: ${missing[*]}"
	command -v apt-get >/dev/null || die "this machine has no apt-get, so install by hand: ${missing[*]}"
	say "installing ${missing[*]}"
	retry_updated env DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -q -o DPkg::Lock::Timeout=600 --no-install-recommends "${missing[@]}" >&2 || die "install ${missing[*]}"
}

# apt_update reads the package lists: of several at once, which apt refuses, one
# after the other.
apt_update() {
	mkdir -p "$CACHE"
	flock "$CACHE/apt-update.lock" apt-get update -q >&2
}

# retry_updated COMMAND...: once more with fresh package lists if it fails,
# because a mirror drops a package's old version when a new one comes.
retry_updated() { "$@" || { say "refreshing the package lists"; apt_update && "$@"; }; }

# machine_sources: label, URI and codename of the machine's Debian sources.
machine_sources() {
	apt-get indextargets --format '$(LABEL)|$(REPO_URI)|$(CODENAME)' \
		'Created-By: Packages' 'Origin: Debian' | sort -u
}

# private_apt: points apt at lists and a cache of our own which know the source
# packages of $SOURCE_SUITE. The mirror is the one that the machine uses for
# Debian itself; nothing below /etc/apt or /var/lib/apt changes.
private_apt() {
	local dir=$APT_DIR label uri codename suite
	need debian-archive-keyring
	mkdir -p "$dir"/{sources,lists/partial,archives/partial}
	# Builds of several things may run at once, and share this.
	exec 7>"$dir/lock"
	flock 7
	[[ $(machine_sources) ]] || apt_update
	while IFS='|' read -r label uri codename; do
		case $label in
		Debian) suite=$SOURCE_SUITE; [[ $codename != *-* ]] || continue ;;
		Debian-Security) suite=$SOURCE_SUITE-security ;;
		*) continue ;;
		esac
		printf '%s\n' 'Types: deb deb-src' "URIs: $uri" "Suites: $suite" 'Components: main' \
			'Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg' ''
	done < <(machine_sources) >"$dir/new"
	[[ -s $dir/new ]] || die "no Debian mirror among the machine's package sources"
	cat >"$dir/apt.conf" <<-EOF
		Dir::Etc::SourceList "/dev/null";
		Dir::Etc::SourceParts "$dir/sources";
		Dir::Etc::Preferences "/dev/null";
		Dir::Etc::PreferencesParts "/dev/null";
		Dir::State::Lists "$dir/lists";
		Dir::Cache "$dir";
		Dir::Cache::archives "archives";
		APT::Sandbox::User "root";
	EOF
	export APT_CONFIG=$dir/apt.conf
	if ! cmp -s "$dir/new" "$dir/sources/vmrt.sources" || [[ ${VMRT_UPDATE:-} ]] ||
		[[ -z $(find "$dir/lists" -name '*Sources*' -mmin -1440) ]]; then
		say "reading the package lists of $SOURCE_SUITE"
		mv "$dir/new" "$dir/sources/vmrt.sources"
		apt_update
	fi
	exec 7>&-
}

# candidate PACKAGE: the newest version that apt can download.
candidate() {
	local v
	v=$(LC_ALL=C apt-cache policy "$1" | sed -n 's/^  Candidate: //p')
	[[ $v && $v != '(none)' ]] || die "no package $1 in the archive"
	printf '%s\n' "$v"
}

# progress WHAT TOTAL LOG: copies stdin to LOG and says every few seconds how
# many of about TOTAL lines have come.
progress() {
	local what=$1 total=$2 log=$3 n=0 start=$SECONDS next=$((SECONDS + 10)) line
	while IFS= read -r line; do
		printf '%s\n' "$line" >&8
		n=$((n + 1))
		((SECONDS < next)) && continue
		next=$((SECONDS + 10))
		say "  $what: $n of about $total steps, $((SECONDS - start)) s"
	done 8>"$log"
	say "  $what: $n steps, $((SECONDS - start)) s"
}
