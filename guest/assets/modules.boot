# Modules that the stock initramfs carries and the agent loads before it reports:
# what it takes to reach the host and to mount root file systems and volumes.
# What they depend on is added; what a kernel has built in is left out. A name
# that starts with "?" may be missing, because kernels differ.
virtio_mmio
vmw_vsock_virtio_transport
virtiofs
overlay
virtio_blk
virtio_scsi
sd_mod
virtio_net
virtio_rng
erofs
loop
?crc32c_generic
