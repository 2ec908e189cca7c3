package shim

import (
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/containerd/log"
)

// A shim lives as long as its pod and is idle nearly always: what its requests
// have used and the collector keeps for the next is memory that every pod
// costs.
const (
	// trimQuiet is how long after the last request memory is given back.
	trimQuiet = 2 * time.Second
	// trimInterval is the least time between two times: probes come every few
	// seconds for as long as a pod lives.
	trimInterval = 30 * time.Second
)

// trimmer gives unused memory back to the system.
type trimmer struct {
	mu    sync.Mutex
	timer *time.Timer
	last  time.Time
}

// soon is called at the end of a request.
func (t *trimmer) soon() {
	t.mu.Lock()
	defer t.mu.Unlock()
	d := max(trimQuiet, time.Until(t.last.Add(trimInterval)))
	if t.timer == nil {
		t.timer = time.AfterFunc(d, t.trim)
		return
	}
	t.timer.Reset(d)
}

func (t *trimmer) trim() {
	t.mu.Lock()
	t.last = time.Now()
	t.mu.Unlock()
	// A sync.Pool keeps what it has through one collection.
	runtime.GC()
	debug.FreeOSMemory()
	if err := unmapOwnFile(); err != nil {
		log.L.WithError(err).Debug("the program's file stays mapped")
	}
}
