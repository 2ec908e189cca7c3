// Package vhostuser is the back end of the vhost-user protocol: it serves a
// virtio device from this process to a virtual machine monitor (the front
// end) over a unix socket, on guest memory that both have mapped.
//
// A Backend speaks the protocol, maps guest memory and runs split virtqueues;
// a Device gives it meaning. Protocol facts are from the vhost-user
// specification (docs/interop/vhost-user.rst of QEMU), ring facts from virtio
// 1.2 (section 2.7, split virtqueues).
//
// # Concurrency
//
// One mutex, the Device's own, guards all queues: queue methods must be called
// with it held. Serve runs one goroutine for the socket and one for each
// queue's kicks; nothing else is started.
//
// # Trust
//
// The guest is hostile and changes its memory at any time. Descriptors are
// copied once and then checked, indices are loaded once, chains are bounded in
// length, and no byte outside a mapped region is touched: any violation is an
// error that ends Serve. The front end may be hostile as well (a guest that
// has escaped into it): messages are bounded and checked, and memory regions
// must be memfds sealed against shrinking (F_SEAL_SHRINK, what QEMU's
// memory-backend-memfd does by default), because access to a region that was
// truncated after the mapping would be SIGBUS. What remains is that a hostile
// front end, which shares the notification eventfds, may make them blocking
// and full, and so block the goroutine that notifies.
//
// # Not guaranteed
//
// Packed rings, IOMMU, migration logging, postcopy, in-flight tracking and
// back-end requests are not offered. Hosts are little-endian.
package vhostuser
