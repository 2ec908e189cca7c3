#!/bin/bash
# Runs one set of tests: hack/test.sh all|unit|vm|kvm|critest|bench.
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
# The tests that also run in the nested machine, and which packages have them.
KVM_PACKAGES=(./pkg/... ./tests/...)
KVM_RUN=${KVM_RUN:-^TestKVM}
KVM_TIMEOUT=${KVM_TIMEOUT:-20m}

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
	go run ./hack/buildtool "$@" >/dev/null
}

# kvm runs test programs, compiled here, in the nested machine.
kvm() {
	local tmp pkg dir test code
	tmp=$(mktemp -d)
	trap 'rm -rf "$tmp"' EXIT
	go build -o "$tmp/lab" ./tests/lab
	for pkg in $(go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}' "${KVM_PACKAGES[@]}"); do
		dir=${pkg#"$MODULE/"}
		grep -qsE "^func ${KVM_RUN#^}" "$dir"/*_test.go || continue
		test=$tmp/${dir//\//-}.test
		go test -c -o "$test" "$pkg"
		echo "running $dir in the nested machine"
		{
			code=0
			(cd "$dir" && VMRT_REQUIRE_VM=1 "$tmp/lab" -timeout "$KVM_TIMEOUT" -- \
				"$test" -test.v=test2json -test.run "$KVM_RUN" -test.timeout "$KVM_TIMEOUT") || code=$?
			# From 124 on it is not the tests that failed.
			((code < 124)) || printf '\n\x16=== RUN   Lab\nlab: exit code %d\n\x16--- FAIL: Lab (0.00s)\n\x16FAIL\n' $code
		} | go tool test2json -t -p "$pkg"
	done
}

case ${1:-} in
all)
	prepare containerd containerd-2.3 runc nerdctl cni critools
	{ go_test $(others); go_test -p 1 $(vm); } | summary
	;;
unit) go_test -short -skip "$VM_TESTS" $(go list ./... | grep -v "^$MODULE/tests") | summary ;;
vm)
	prepare containerd containerd-2.3 runc nerdctl cni critools
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
bench)
	prepare containerd containerd-2.3 runc nerdctl cni critools
	go test -p 1 -run '^$' -bench "${BENCH:-.}" -timeout 60m ${TEST_FLAGS:-} ./...
	;;
*)
	echo "usage: hack/test.sh all|unit|vm|kvm|critest|bench" >&2
	exit 2
	;;
esac
