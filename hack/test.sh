#!/bin/bash
# Runs one set of tests: hack/test.sh all|unit|vm|qemu|kvm|critest|bench.
#
# VMRT_REQUIRE_VM=1 turns the skip of a test that needs root or a virtual
# machine into a failure. VMRT_TEST_EVENTS names a file to which the events of
# `go test -json` are appended. TEST_FLAGS are further flags for go test.
set -euo pipefail
cd "$(dirname "$0")/.."

MODULE=github.com/vmrt/vmrt
# Packages whose tests start virtual machines or a containerd. They run one
# after the other: they measure time, and each can keep the machine busy.
VM=(./guest/... ./pkg/agent ./pkg/hypervisor/qemu/... ./pkg/network ./pkg/storage ./pkg/vsock ./tests/...)
# The package that runs critest, which takes long, has a target of its own.
CRITEST=$MODULE/tests/critest
# The tests among them that do so, by their names; test-unit is without.
VM_TESTS='^(Test|Benchmark)(VM|KVM|Boot|Integration|Pause)'
# The tests that run in the nested machine, package by package: what differs
# with KVM, the kernel's vsock device and vhost-net, and one of each kind of what
# does not. There a container takes half a minute to start.
KVM=(
	'pkg/hypervisor/accel ^TestKVM$'
	'pkg/hypervisor/qemu ^TestIntegration(Identify|BootAndKill|SMP|Unprivileged|BadKernel|Interfaces|Share)$/^tuned$'
	'pkg/vsock ^TestKVM$'
	'pkg/agent ^TestKVM'
	'pkg/network ^TestKVM'
	'tests/conformance ^Test(Lifecycle|Exec|StdinRoundTrip|HostKill|Clock|VMKilled|ShimKilled)$'
	'tests/lab/kvm ^TestKVM'
)
# What these tests would build.
KVM_PROGRAMS=(pkg/hypervisor/qemu/testdata/init pkg/vsock/internal/vsockguest pkg/network/internal/probe/guest)
KVM_TIMEOUT=${KVM_TIMEOUT:-20m} # of a nested machine
KVM_TEST_TIMEOUT=10m            # of a package in it
# The tests for which the versions of QEMU and virtiofsd matter.
VMM=(./guest ./pkg/hypervisor/qemu/... ./pkg/storage ./pkg/vsock ./tests/conformance)
VMM_RUN='^Test(Boot|Integration|VM|Pause|Daemon|Lifecycle$|Exec$|BindMounts$|ShimKilled$)'

# vm: the packages of VM without critest; others: the packages not of VM.
vm() { go list "${VM[@]}" | grep -vxF "$CRITEST"; }
others() { go list ./... | grep -vxFf <(go list "${VM[@]}"); }

# go_test FLAG|PACKAGE...: a failed test is testsum's to report.
go_test() { go test -json -timeout 30m ${TEST_FLAGS:-} "$@" || true; }

summary() { go run ./hack/testsum ${VMRT_TEST_EVENTS:+-o "$VMRT_TEST_EVENTS"}; }

# prepare TOOL...: installs and builds what the tests run.
prepare() {
	hack/deps.sh test
	make --no-print-directory build
	(($# == 0)) || go run ./hack/buildtool "$@" >/dev/null
}

# kvm runs test programs, compiled here, in a nested machine. What has failed
# there, or was not reached, gets a second machine: the first one's processor is
# emulated, and now and then a CPU of it takes no interrupts any more after a
# machine within has run on it (the lab notices, and ends the machine), or its
# kernel panics. Both runs are shown and the second counts. The events of what
# counts are printed.
kvm() {
	local entry dir run program
	# Not local: the trap reads it when the function has returned.
	tmp=$(mktemp -d)
	trap 'rm -rf "$tmp"' EXIT
	go build -o "$tmp/lab" ./tests/lab
	go build -o "$tmp/test2json" cmd/test2json
	for dir in "${KVM_PROGRAMS[@]}"; do
		CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o "$tmp/programs/${dir//\//-}" "./$dir"
	done
	for entry in "${KVM[@]}"; do
		read -r dir run <<<"$entry"
		[[ $MODULE/$dir =~ ${KVM_ONLY:-} ]] || continue
		program=$tmp/${dir//\//-}.test
		go test -c -o "$program" "./$dir"
		printf 'cd %q && %q -t -p %q %q -test.v=test2json -test.run %q -test.timeout %q\n' "$PWD/$dir" \
			"$tmp/test2json" "$MODULE/$dir" "$program" "${KVM_RUN:-$run}" "$KVM_TEST_TIMEOUT"
	done >"$tmp/script"
	if in_nested_machine; then
		cat "$tmp/events"
		return
	fi
	while read -r entry; do
		[[ $entry =~ \ -p\ ([^ ]+) ]] && dir=${BASH_REMATCH[1]}
		if grep -q "\"Action\":\"pass\",\"Package\":\"$dir\",\"Elapsed\"" "$tmp/events"; then
			grep -F "\"Package\":\"$dir\"" "$tmp/events"
		else
			echo "$entry" >&3
		fi
	done <"$tmp/script" 3>"$tmp/again"
	echo "a second nested machine for what did not pass: $(wc -l <"$tmp/again") of $(wc -l <"$tmp/script") packages" >&2
	mv "$tmp/again" "$tmp/script"
	in_nested_machine || true
	cat "$tmp/events"
}

# in_nested_machine runs $tmp/script in a machine of its own, shows how it goes,
# and leaves the events in $tmp/events. It fails unless all has passed.
in_nested_machine() {
	local code=0
	{
		VMRT_REQUIRE_VM=1 VMRT_PROGRAMS=$tmp/programs "$tmp/lab" -timeout "$KVM_TIMEOUT" -- bash "$tmp/script" || code=$?
		# From 124 on it is not the tests that failed.
		((code < 124)) || printf 'lab: exit code %d\n{"Action":"fail","Package":"%s/tests/lab"}\n' "$code" "$MODULE"
	} | tee "$tmp/events" | go run ./hack/testsum >&2
}

# other_release: the Debian release whose QEMU and virtiofsd this machine does
# not have.
other_release() (
	. /etc/os-release
	[[ $VERSION_CODENAME == bookworm ]] && echo trixie || echo bookworm
)

case ${1:-} in
all)
	prepare containerd containerd-2.3 runc nerdctl cni critools docker
	hack/docker.sh >/dev/null
	{ go_test $(others); go_test -p 1 $(vm); } | summary
	;;
unit) go_test -short -skip "$VM_TESTS" $(go list ./... | grep -v "^$MODULE/tests") | summary ;;
vm)
	prepare containerd containerd-2.3 runc nerdctl cni critools docker
	hack/docker.sh >/dev/null
	go_test -p 1 $(vm) | summary
	;;
kvm)
	prepare containerd
	kvm | summary
	;;
critest)
	prepare critest critools containerd runc cni
	hack/busybox.sh >/dev/null
	echo "critest runs; bin/critest/*/output.log shows how far it is"
	rm -rf bin/critest
	status=0
	go_test -count=1 -timeout 90m "$CRITEST" -runtime "${RUNTIME:-vmrt}" -sandboxer "${SANDBOXER:-}" \
		-focus "${FOCUS:-}" -nodes "${NODES:-4}" | summary || status=$?
	head -qn 1 bin/critest/*/summary.txt
	exit $status
	;;
qemu)
	prepare
	export -f go_test
	tests/vmm.sh "${RELEASE:-$(other_release)}" bash -c 'go_test -p 1 "$@"' go_test -run "$VMM_RUN" "${VMM[@]}" | summary
	;;
bench)
	prepare containerd containerd-2.3 runc nerdctl cni critools
	go test -p 1 -run '^$' -bench "${BENCH:-.}" -timeout 60m ${TEST_FLAGS:-} ./...
	;;
*)
	echo "usage: hack/test.sh all|unit|vm|qemu|kvm|critest|bench" >&2
	exit 2
	;;
esac
