package shim

import (
	"context"

	"github.com/containerd/log"

	"github.com/vmrt/vmrt/pkg/cgroup"
	"github.com/vmrt/vmrt/pkg/config"
	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/hypervisor/accel"
)

// A pod's overhead (RuntimeClass, overhead.podFixed.memory) is what it may use of
// its node beyond the limits of its containers. A virtual machine pays from it
// what runs on the host, and what is left is the guest's own.

// guestMiB is the least that a guest has beyond its containers' limit of so many
// MiB, so that they can use the whole of that: 64 MiB for kernel and agent, and
// what the kernel keeps of each page (struct page: 64 bytes of 4096).
func guestMiB(limitMiB int64) int64 { return 64 + limitMiB/64 }

// hostMiB is what the processes that serve a virtual machine use of the host:
// QEMU without the guest's memory, virtiofsd, the anchors and what the kernel has
// for them, which count in the pod's cgroup, and the shim. Measured by
// TestHostMemory (tests/conformance), where eight processes of a container are busy
// with files: 30 MiB with KVM, 94 with TCG, 99 with TCG and the stock kernel; with
// five times as many files 39 with KVM and 110 with TCG, a fifth of it caches that
// the kernel can take back. Page tables of the guest's memory, which are beside
// that, take 2 MiB a GiB for QEMU and as much for KVM.
func hostMiB(a hypervisor.Accelerator, limitMiB int64) int64 {
	base := int64(40)
	if a == hypervisor.TCG {
		base = 112 // translated code, and what there is to know of it
	}
	return base + limitMiB/256
}

// passtMiB is what passt uses of the host for a pod with the host's network: its
// static buffers, of which it touches 29 MiB at once and has 67.
const passtMiB = 64

// maxInferred bounds an overhead that is told from a cgroup, in bytes: where there
// is more, that is not the pod's own cgroup but one for many.
const maxInferred = 1 << 30

// learnOverhead fills in what a pod's overhead leaves for the guest, where the
// containers have a limit and the overhead is known: from the pod's configuration
// or, since containerd's podsandbox mode does not hand it over, from the limit of
// the cgroup in which the kubelet keeps the pod, which is the sum of both.
func (p *podConfig) learnOverhead(settings *config.Config) {
	l := &p.limits
	if p.open == nil || l.memory <= 0 || l.overhead < -1 {
		return
	}
	// Without a path there is no pod's cgroup; a bad one is for its making to refuse.
	pod, err := cgroup.ParentMemory(p.cgroupsPath)
	if l.overhead <= 0 {
		if err != nil || pod == 0 || int64(pod)-l.memory > maxInferred {
			return
		}
		// Less than nothing, while the pod is being resized, is nothing.
		l.overhead = max(0, int64(pod)-l.memory)
	}
	// Where some of the containers have no limit, nor has the pod.
	unbounded := err == nil && pod == 0
	wish := settings.Accelerator
	if wish == hypervisor.Auto {
		if found, err := accel.Choose(context.Background(), wish, accel.Config{}); err == nil {
			wish = found.Accelerator
		}
	}
	guest, host := guestMiB(l.memoryMiB()), hostMiB(wish, l.memoryMiB())
	if p.hostNetwork {
		host += passtMiB
	}
	l.shareMiB = l.overhead>>20 - host
	if l.shareMiB < guest && !unbounded {
		log.L.WithField("pod", p.name).Warnf("the pod's overhead of %d MiB is too small for its virtual machine: "+
			"the host may end it when its containers use the %d MiB that they may; an overhead of %d MiB is enough",
			l.overhead>>20, l.memoryMiB(), guest+host)
	}
}
