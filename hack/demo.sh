#!/bin/bash
# From a bare Debian 12 or 13 to a container that runs in a virtual machine:
# installs what is missing, builds, and runs hack/demo. It changes nothing else
# of the machine.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { printf '\n== %s (%d s)\n' "$*" $SECONDS; }

step "1/4 Debian packages and Go"
hack/deps.sh demo
echo "using $(go version)"

step "2/4 vmrt: programs, guest kernel, initramfs"
make --no-print-directory build

step "3/4 containerd"
go run ./hack/buildtool containerd-lean >/dev/null

step "4/4 a container in a virtual machine"
go run ./hack/demo "$@"
printf '\nDone in %d s.\n' $SECONDS
