#!/bin/bash
# Runs every fuzz test of the tree for the given time: hack/fuzz.sh 30s.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-30s}
status=0
while IFS=: read -r file name; do
	dir=./${file%/*}
	echo "fuzzing $dir $name for $time"
	go test -run '^$' -fuzz "^$name\$" -fuzztime "$time" "$dir" || status=1
done < <(grep -rEo --include='*_test.go' '^func Fuzz[A-Za-z0-9_]+' --exclude-dir=.git . | sed 's|^\./||; s|func ||' | sort)
exit $status
