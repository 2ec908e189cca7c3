#!/bin/bash
# assemble.sh AGENT VERSION OUT: makes the guest files below OUT from the agent
# program: OUT/stock always, OUT/tuned if a tuned kernel was built before.
. "$(dirname "$0")/lib.sh"

main() {
	local agent=$1 version=$2 out=$3 crun kernel
	# Not in the cache: another clone may have another version of it.
	tmp=$(mktemp -d)
	trap 'rm -rf "$tmp"' EXIT
	crun=$("$GUEST/crun.sh")
	mkdir -p "$out"
	(cd "$GUEST/.." && go build -o "$tmp/mkguest" ./cmd/mkguest)
	kernel=$("$GUEST/kernel-stock.sh")
	mkguest stock
	kernel=$("$GUEST/kernel.sh" -n)
	if [[ -z $kernel ]]; then
		kernel=$(newest "$CACHE"/kernel-tuned-*)
		say "note: ${kernel:+the tuned kernel is of another configuration; }'make kernel' builds the tuned kernel, which boots faster than the stock one"
	fi
	if [[ $kernel ]]; then
		mkguest tuned
	else
		rm -rf "${out:?}/tuned"
	fi
}

mkguest() {
	"$tmp/mkguest" -kind "$1" -kernel "$kernel" -out "$out/$1" -agent "$agent" -agent-version "$version" \
		-runtime "$crun/crun" -runtime-version "crun $(<"$crun/version")" >&2
}

main "$@"; exit
