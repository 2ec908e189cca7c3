package vhostuser

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"time"
)

// watcher is the goroutine that waits for one running queue's kicks.
type watcher struct {
	stop atomic.Bool
	done chan struct{}
}

// enable starts queue i if nothing is missing.
func (b *Backend) enable(i int) error {
	q := b.queues[i]
	if q.watcher != nil || !q.enabled && b.features&featureProtocolFeatures != 0 {
		// Without protocol features there is no message that enables a queue.
		return nil
	}
	if q.kick == nil || !q.hasAddr || q.size == 0 {
		return nil
	}
	if b.features&featureVersion1 == 0 {
		return fmt.Errorf("queue %d: the driver did not accept VIRTIO_F_VERSION_1", i)
	}
	conn, err := q.kick.SyscallConn()
	if err != nil {
		return fmt.Errorf("queue %d: %w", i, err)
	}
	b.mu.Lock()
	err = q.start(b.mem, b.features)
	b.mu.Unlock()
	if err != nil {
		return fmt.Errorf("queue %d: %w", i, err)
	}
	q.watcher = &watcher{done: make(chan struct{})}
	go b.watch(i, q.watcher, conn)
	return nil
}

// watch calls the device for each kick, and once at the start.
//
// A kick adds to an eventfd's counter, which is never read: the poller is
// edge-triggered and reports every addition. That saves a system call for
// each kick, and nothing that the front end does to the descriptor can block
// the goroutine. All of it is one RawConn.Read, because the poller forgets
// what happened before the start of a Read.
func (b *Backend) watch(i int, w *watcher, kick syscall.RawConn) {
	defer close(w.done)
	err := kick.Read(func(uintptr) bool {
		for !w.stop.Load() && b.dev.Kicked(i) {
		}
		return w.stop.Load()
	})
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.Fail(fmt.Errorf("wait for kicks of queue %d: %w", i, err))
	}
}

// disable stops queue i if it runs, after a last look of the device at it: a
// guest that has just ended may have left data there.
func (b *Backend) disable(i int) {
	q := b.queues[i]
	if q.watcher == nil {
		return
	}
	q.watcher.stop.Store(true)
	_ = q.kick.SetReadDeadline(aLongTimeAgo)
	<-q.watcher.done
	_ = q.kick.SetReadDeadline(time.Time{})
	q.watcher = nil
	b.dev.Kicked(i)
	b.mu.Lock()
	defer b.mu.Unlock()
	q.stop()
}

// teardown stops everything and lets go of it.
func (b *Backend) teardown() {
	for i, q := range b.queues {
		b.disable(i)
		q.setKick(nil)
		b.mu.Lock()
		q.call.close()
		q.err.close()
		b.mu.Unlock()
	}
	b.mem.close()
	b.mem = nil
}
