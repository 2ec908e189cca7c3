#!/bin/bash
# gofmt, go vet, staticcheck (pinned in tools/go.mod), shell syntax. Every
# check runs; the exit code tells whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
status=0
check() {
	echo "lint: $1"
	shift
	"$@" || status=1
}

# Packages that have a meaning on other systems too must compile there.
PORTABLE=(./api/... ./cmd/mkguest ./guest ./guest/assets ./guest/initramfs ./guest/kmod
	./hack/buildtool ./hack/testsum ./hack/tools
	./pkg/config ./pkg/guestspec ./pkg/hypervisor ./pkg/hypervisor/accel ./pkg/hypervisor/hostcpu
	./pkg/hypervisor/qemu/qmp ./pkg/version)

formatted() {
	local files
	files=$("$(go env GOROOT)/bin/gofmt" -l $(git ls-files --cached --others --exclude-standard -- '*.go'))
	[[ -z $files ]] || { echo "not formatted by gofmt: $files"; return 1; }
}
shell_syntax() {
	local f bad=0
	for f in $(git ls-files --cached --others --exclude-standard -- '*.sh' .ci/run hack/bin/go); do
		bash -n "$f" || bad=1
	done
	return $bad
}

check gofmt formatted
check "go vet" go vet ./...
check "go vet, darwin" env GOOS=darwin CGO_ENABLED=0 go vet "${PORTABLE[@]}"
check staticcheck go tool -modfile=tools/go.mod staticcheck ./...
check "shell syntax" shell_syntax
exit $status
