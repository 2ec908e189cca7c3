package vhostuser

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Feature bits that this package handles itself (virtio 1.2, section 6, and
// vhost-user specification, "Feature negotiation").
const (
	featureIndirect         = 1 << 28 // VIRTIO_F_INDIRECT_DESC
	featureEventIdx         = 1 << 29 // VIRTIO_F_EVENT_IDX
	featureProtocolFeatures = 1 << 30 // VHOST_USER_F_PROTOCOL_FEATURES
	featureVersion1         = 1 << 32 // VIRTIO_F_VERSION_1

	ringFeatures = featureIndirect | featureEventIdx | featureProtocolFeatures | featureVersion1
)

// maxQueueSize is the largest split queue (virtio 1.2, section 2.7).
const maxQueueSize = 32768

// availNoInterrupt is VIRTQ_AVAIL_F_NO_INTERRUPT.
const availNoInterrupt = 1

// Queue is one split virtqueue. Its methods must be called with the mutex of
// its Backend held. While the front end has the queue stopped, there is
// nothing in it.
type Queue struct {
	// Of the goroutine in Serve, which changes size only while the queue is
	// stopped. Kept over a stop.
	size    uint32
	addr    vringAddr
	hasAddr bool
	enabled bool
	kick    *os.File
	watcher *watcher // nil while stopped

	// Guarded by the Backend's mutex from here on.
	call, err eventFD

	running            bool
	mem                *memory
	desc, avail, used  []byte
	eventIdx, indirect bool

	// nextAvail is the next entry of the available ring to take. It survives
	// a stop: the front end saves it and hands it back. While stopped it
	// belongs to the goroutine in Serve.
	nextAvail uint16
	// availIdx is the driver's index as last loaded.
	availIdx uint16
	// nextUsed is the next entry of the used ring to write, and usedIdx the
	// index that the driver has been shown.
	nextUsed, usedIdx uint16
	// mustCall says that the queue has just started: what the driver has seen
	// of the used ring is unknown.
	mustCall bool
	barrier  atomic.Uint32
}

// Running reports whether the queue is served: the driver is ready and the
// machine not paused.
func (q *Queue) Running() bool { return q.running }

// Next takes the next buffer that the driver has made available and reports
// whether there was one. Every buffer taken must be given back with Done, in
// order, before the lock is released. An error means that the driver broke
// the rules; the queue is then of no more use.
func (q *Queue) Next(c *Chain) (bool, error) {
	if !q.running {
		return false, nil
	}
	if q.nextAvail == q.availIdx {
		if q.availIdx = loadUint16(q.avail, 2); q.availIdx == q.nextAvail {
			return false, nil
		}
	}
	if n := uint32(q.availIdx - q.nextAvail); n > q.size {
		return false, fmt.Errorf("available index %d, %d beyond the last one, in a queue of %d", q.availIdx, n, q.size)
	}
	slot := uint32(q.nextAvail) & (q.size - 1)
	head := loadUint16(q.avail, int(4+2*slot))
	if err := c.walk(q.mem, q.desc, head, q.indirect); err != nil {
		return false, fmt.Errorf("chain %d: %w", head, err)
	}
	q.nextAvail++
	return true, nil
}

// Done gives a buffer back of which the device wrote the first n bytes. The
// driver sees it after Flush.
func (q *Queue) Done(c *Chain, n uint32) {
	slot := uint32(q.nextUsed) & (q.size - 1)
	entry := q.used[4+8*slot:][:8]
	binary.LittleEndian.PutUint32(entry, uint32(c.head))
	binary.LittleEndian.PutUint32(entry[4:], n)
	q.nextUsed++
	c.Readable.reset()
	c.Writable.reset()
}

// Flush shows the driver all buffers given back, and interrupts it if it
// wants to be.
func (q *Queue) Flush() {
	if !q.running || q.usedIdx == q.nextUsed {
		return
	}
	old := q.usedIdx
	q.usedIdx = q.nextUsed
	// The low half is the flags: 0, the driver kicks as it likes.
	storeUint32(q.used, 0, uint32(q.usedIdx)<<16)
	q.fence()
	if q.wantsCall(old) {
		q.call.signal()
	}
}

// wantsCall reports whether the driver asked for an interrupt by the used
// indices from old+1 up to usedIdx (virtio 1.2, sections 2.7.7 and 2.7.10).
func (q *Queue) wantsCall(old uint16) bool {
	if !q.eventIdx {
		return loadUint16(q.avail, 0)&availNoInterrupt == 0
	}
	event := loadUint16(q.avail, int(4+2*q.size))
	if q.mustCall {
		q.mustCall = false
		return true
	}
	return q.usedIdx-event-1 < q.usedIdx-old
}

// WantKick asks the driver for a kick when it makes the next buffer
// available, and reports whether one has become available meanwhile, so that
// no kick may come. Then Next does not report false: a driver that moves its
// index to and fro cannot keep a device in a loop. To be called when Next has
// reported false and before the device waits.
func (q *Queue) WantKick() (more bool) {
	if !q.running {
		return false
	}
	if q.eventIdx {
		storeUint16(q.used, int(4+8*q.size), q.nextAvail)
		q.fence()
	}
	q.availIdx = loadUint16(q.avail, 2)
	return q.availIdx != q.nextAvail
}

// fence orders what was stored before it before what is loaded after it. An
// atomic read-modify-write is a full barrier on amd64 (LOCK prefix) and on
// arm64 (LSE instruction with acquire and release).
func (q *Queue) fence() { q.barrier.Add(1) }

// setKick replaces the kick descriptor of a queue that is stopped.
func (q *Queue) setKick(f *os.File) {
	if q.kick != nil {
		q.kick.Close()
	}
	q.kick = f
}

// start begins to serve a queue of which everything is set.
func (q *Queue) start(m *memory, features uint64) error {
	if err := q.mapRings(m); err != nil {
		return err
	}
	q.eventIdx = features&featureEventIdx != 0
	q.indirect = features&featureIndirect != 0
	q.availIdx = q.nextAvail
	q.nextUsed = loadUint16(q.used, 2)
	q.usedIdx = q.nextUsed
	q.mustCall = true
	q.running = true
	return nil
}

// mapRings finds the three parts of the queue in guest memory (virtio 1.2,
// section 2.7: sizes and alignments). With the event index each ring has one
// more number; it is always taken along.
func (q *Queue) mapRings(m *memory) (err error) {
	n := uint64(q.size)
	if q.desc, err = m.user(q.addr.desc, descSize*n, 16); err != nil {
		return fmt.Errorf("descriptor table: %w", err)
	}
	if q.avail, err = m.user(q.addr.avail, 4+2*n+2, 2); err != nil {
		return fmt.Errorf("available ring: %w", err)
	}
	if q.used, err = m.user(q.addr.used, 4+8*n+2, 4); err != nil {
		return fmt.Errorf("used ring: %w", err)
	}
	q.mem = m
	return nil
}

// stop ends serving. The queue keeps no reference to guest memory.
func (q *Queue) stop() {
	q.Flush()
	q.running = false
	q.mem, q.desc, q.avail, q.used = nil, nil, nil, nil
}

// eventFD is a descriptor that is signalled, or -1. It stays out of the
// runtime's poller, which would wake up for every signal sent.
type eventFD int

const noEventFD eventFD = -1

// signal adds one to the counter. A counter that is full has a wake-up
// pending, and a peer that has gone needs none.
func (e eventFD) signal() {
	if e < 0 {
		return
	}
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	_, _ = unix.Write(int(e), one[:])
}

func (e *eventFD) close() {
	if *e >= 0 {
		unix.Close(int(*e))
		*e = noEventFD
	}
}
