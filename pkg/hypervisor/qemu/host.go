package qemu

import (
	"path/filepath"

	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/hypervisor/hostcpu"
	"github.com/vmrt/vmrt/pkg/hypervisor/internal/bootcache"
)

// host is what the command line depends on besides spec and binary.
type host struct {
	// TSCKHz is the frequency of the host's time stamp counter, 0 if it has
	// none or it varies.
	TSCKHz uint64
}

// identifyHost measures the host, which takes 10 ms once a boot. What cannot be
// measured stays zero; err says why.
func identifyHost(dir string) (h host, err error) {
	model, err := hostcpu.Model()
	if err != nil {
		return host{}, err
	}
	file := cacheFile(dir, "host.json")
	if err := bootcache.Load(file, model, &h); err == nil {
		return h, nil
	}
	if h.TSCKHz, err = hostcpu.TSCKHz(); err != nil {
		return host{}, err
	}
	// Without the cache the next caller pays again, nothing else.
	_ = bootcache.Store(file, model, h)
	return h, nil
}

func cacheFile(dir, name string) string {
	if dir == "" {
		dir = hypervisor.DefaultCacheDir
	}
	return filepath.Join(dir, name)
}
