# vmrt: containerd runtime that runs each pod in a virtual machine of its own.
# `make help` lists the targets.

SHELL := /bin/bash
.DEFAULT_GOAL := help

# hack/bin/go finds a Go toolchain that is new enough.
export PATH := $(CURDIR)/hack/bin:$(PATH)
# Go's caches and ours are below it; cron and systemd do not set it.
export HOME := $(or $(HOME),$(shell unset HOME; echo ~))

VERSION  := $(or $(shell git describe --tags --always --dirty 2>/dev/null),devel)
REVISION := $(shell git rev-parse HEAD 2>/dev/null)
MODULE   := github.com/vmrt/vmrt
# containerd's package of shims prints its own version for -v.
SHIM     := github.com/containerd/containerd/v2/version
LDFLAGS  := -s -w -X $(MODULE)/pkg/version.Version=$(VERSION) -X $(MODULE)/pkg/version.Revision=$(REVISION) \
	-X $(SHIM).Version=$(VERSION) -X $(SHIM).Revision=$(REVISION)
GO_BUILD := CGO_ENABLED=0 go build -trimpath -buildvcs=false -tags no_grpc -ldflags '$(LDFLAGS)'

FUZZTIME ?= 30s

root = @[ "$$(id -u)" = 0 ] || { echo "make $@ needs root: run it as root, for example by 'sudo make $@'" >&2; exit 1; }
deps = @hack/deps.sh

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  %-16s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: ## run a container in a virtual machine, start to end, on a machine that has nothing (root)
	$(root)
	@hack/demo.sh

.PHONY: build
build: binaries initramfs ## binaries and guest files into bin/

PROGRAMS := bin/containerd-shim-vmrt-v2 bin/vm-agent bin/vmrtctl

.PHONY: binaries $(PROGRAMS)
binaries: $(PROGRAMS) ## the Go programs alone into bin/

$(PROGRAMS): bin/%:
	$(deps) build
	@$(GO_BUILD) -o $@ ./cmd/$*
	@printf '%-32s%5d kB\n' $@ $$(($$(stat -c %s $@) / 1000))

include guest.mk

.PHONY: test test-unit test-vm test-qemu test-kvm
test: ## all tests: unit, root, virtual machines (root)
	$(root)
	@hack/test.sh all

test-unit: ## tests that need neither root nor a virtual machine
	@hack/test.sh unit

test-vm: ## tests that start virtual machines or a containerd (root)
	$(root)
	@hack/test.sh vm

test-qemu: ## virtual machine tests with QEMU and virtiofsd of the other Debian release (root)
	$(root)
	@hack/test.sh qemu

test-kvm: ## tests in a nested machine that has a real KVM and vhost-vsock (root)
	$(root)
	@hack/test.sh kvm

.PHONY: critest
critest: ## critest, in each sandbox mode; RUNTIME=runc, SANDBOXER=, FOCUS=, NODES= (root)
	$(root)
	@RUNTIME='$(RUNTIME)' SANDBOXER='$(SANDBOXER)' FOCUS='$(FOCUS)' NODES='$(NODES)' hack/test.sh critest

.PHONY: bench
bench: ## benchmarks, with runc and virtio-serial for comparison in the same run (root)
	$(root)
	@hack/test.sh bench

.PHONY: fuzz
fuzz: ## every fuzz test for FUZZTIME (30s)
	@hack/fuzz.sh $(FUZZTIME)

.PHONY: lint
lint: ## gofmt, go vet, staticcheck, shell syntax
	@hack/lint.sh

.PHONY: generate generate-check
generate: ## make the generated code again
	@go tool -modfile=tools/go.mod buf generate

generate-check: ## fail if the generated code is not current
	@hack/generate-check.sh

.PHONY: deps
deps: ## install the Debian packages that building and testing need (root)
	$(root)
	@hack/deps.sh test

.PHONY: tools
tools: ## build containerd, runc, nerdctl and so on for the tests (cached)
	@go run ./hack/buildtool cni containerd containerd-2.3 critest critools docker nerdctl runc >/dev/null
	@hack/docker.sh >/dev/null

.PHONY: clean
clean: ## remove bin/; the cache in ~/.cache/vmrt stays
	rm -rf bin
