#!/bin/bash
# Fails if generated code differs from what the pinned generators make of the
# sources. The tree stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cp -r api buf.yaml buf.gen.yaml go.mod go.sum tools "$tmp/"
find "$tmp/api" -name '*.pb.go' -delete
(cd "$tmp" && go tool -modfile=tools/go.mod buf generate)
if ! diff -ru api "$tmp/api"; then
	echo "generated code is not current: run 'make generate'" >&2
	exit 1
fi
echo "generated code is current"
