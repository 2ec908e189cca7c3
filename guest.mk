# What a virtual machine boots from. Included by the Makefile, which says how
# bin/vm-agent is built and what VERSION is. See guest/README.md.

.PHONY: kernel kernel-stock crun initramfs

kernel: ## build the tuned guest kernel from Debian's source (14 min of CPU, cached)
	@guest/kernel.sh

kernel-stock: ## fetch the stock guest kernel from Debian (cached)
	@guest/kernel-stock.sh

crun: ## build the guest's OCI runtime from Debian's source (1 min of CPU, cached)
	@guest/crun.sh

initramfs: bin/vm-agent ## make bin/guest: kernels, initramfs, manifest
	@guest/assemble.sh bin/vm-agent '$(VERSION)' bin/guest
