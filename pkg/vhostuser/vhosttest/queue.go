package vhosttest

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Buffer is one descriptor's worth of guest memory.
type Buffer struct {
	Addr uint64
	Len  uint32
	// Write says that the device writes it.
	Write bool
}

// Queue is the driver's side of one split virtqueue.
type Queue struct {
	m     *Machine
	index int
	size  uint16
	base  uint32 // where the back end stopped

	descAddr, availAddr, usedAddr uint64
	desc, avail, used             []byte
	eventIdx                      bool

	kickFD, callFD, errFD int
	call                  *os.File // callFD, in the runtime's poller
	// barrier is added to where stores must precede loads.
	barrier atomic.Uint32

	free             []uint16
	chains           [][]uint16 // descriptors by head
	nextAvail, shown uint16
	lastUsed         uint16
}

func (m *Machine) newQueue(index, size int) (*Queue, error) {
	q := &Queue{m: m, index: index, size: uint16(size)}
	q.descAddr, q.desc = m.Alloc(16 * size)
	q.availAddr, q.avail = m.Alloc(4 + 2*size + 2)
	q.usedAddr, q.used = m.Alloc(4 + 8*size + 2)
	q.reset()
	var err error
	if q.kickFD, err = eventfd(); err != nil {
		return nil, err
	}
	if q.errFD, err = eventfd(); err != nil {
		return nil, err
	}
	if q.callFD, err = eventfd(); err != nil {
		return nil, err
	}
	q.call = os.NewFile(uintptr(q.callFD), "call")
	return q, nil
}

func (q *Queue) close() {
	unix.Close(q.kickFD)
	unix.Close(q.errFD)
	q.call.Close()
}

// reset makes the queue new.
func (q *Queue) reset() {
	clear(q.desc)
	clear(q.avail)
	clear(q.used)
	q.base, q.nextAvail, q.shown, q.lastUsed = 0, 0, 0, 0
	q.chains = make([][]uint16, q.size)
	q.free = q.free[:0]
	for i := range q.size {
		q.free = append(q.free, q.size-1-i)
	}
}

// Base returns where the back end stopped.
func (q *Queue) Base() uint32 { return q.base }

// Err returns the descriptor by which the back end reports that the queue is
// broken, as a count of reports.
func (q *Queue) Err() uint64 {
	var b [8]byte
	if _, err := unix.Read(q.errFD, b[:]); err != nil {
		return 0
	}
	return binary.NativeEndian.Uint64(b[:])
}

// SetDescriptor writes one descriptor, of any content.
func (q *Queue) SetDescriptor(i int, addr uint64, n uint32, flags, next uint16) {
	putDescriptor(q.desc[16*i:], addr, n, flags, next)
}

func putDescriptor(b []byte, addr uint64, n uint32, flags, next uint16) {
	le := binary.LittleEndian
	le.PutUint64(b, addr)
	le.PutUint32(b[8:], n)
	le.PutUint16(b[12:], flags)
	le.PutUint16(b[14:], next)
}

// Descriptor flags.
const (
	Next     = 1
	Write    = 2
	Indirect = 4
)

// Add makes one chain available and returns its head, or false when there are
// too few descriptors.
func (q *Queue) Add(bufs ...Buffer) (head uint16, ok bool) {
	if len(bufs) > len(q.free) {
		return 0, false
	}
	ids := append([]uint16(nil), q.free[len(q.free)-len(bufs):]...)
	q.free = q.free[:len(q.free)-len(bufs)]
	for i, b := range bufs {
		var flags, next uint16
		if b.Write {
			flags |= Write
		}
		if i+1 < len(bufs) {
			flags |= Next
			next = ids[i+1]
		}
		q.SetDescriptor(int(ids[i]), b.Addr, b.Len, flags, next)
	}
	q.chains[ids[0]] = ids
	q.Publish(ids[0])
	return ids[0], true
}

// AddIndirect is Add with one descriptor for a table of them, which lies at a
// guest address.
func (q *Queue) AddIndirect(addr uint64, bufs ...Buffer) (head uint16, ok bool) {
	if len(q.free) == 0 {
		return 0, false
	}
	table := q.m.mem[addr:][:16*len(bufs)]
	for i, b := range bufs {
		var flags uint16
		if b.Write {
			flags |= Write
		}
		if i+1 < len(bufs) {
			flags |= Next
		}
		putDescriptor(table[16*i:], b.Addr, b.Len, flags, uint16(i+1))
	}
	head = q.free[len(q.free)-1]
	q.free = q.free[:len(q.free)-1]
	q.SetDescriptor(int(head), addr, uint32(len(table)), Indirect, 0)
	q.chains[head] = []uint16{head}
	q.Publish(head)
	return head, true
}

// Publish makes a head available, of any value.
func (q *Queue) Publish(head uint16) {
	slot := int(q.nextAvail & (q.size - 1))
	binary.LittleEndian.PutUint16(q.avail[4+2*slot:], head)
	q.nextAvail++
	q.SetAvailIndex(q.nextAvail)
}

// SetAvailIndex stores the index of the available ring, of any value.
func (q *Queue) SetAvailIndex(i uint16) {
	// The low half holds the flags.
	atomic.StoreUint32(q.word(q.avail, 0), uint32(i)<<16)
}

// word returns the word at an offset, which must be aligned.
func (q *Queue) word(b []byte, off int) *uint32 {
	return (*uint32)(unsafe.Pointer(&b[off : off+4][0]))
}

// Kick tells the device of what was made available, if it wants to know.
func (q *Queue) Kick() {
	old := q.shown
	q.shown = q.nextAvail
	if q.eventIdx {
		q.barrier.Add(1)
		event := binary.LittleEndian.Uint16(q.used[4+8*int(q.size):])
		if q.nextAvail-event-1 >= q.nextAvail-old {
			return
		}
	}
	q.ForceKick()
}

// ForceKick signals the kick descriptor.
func (q *Queue) ForceKick() { _, _ = unix.Write(q.kickFD, U64(1)) }

// Take returns the head of the next chain that the device has given back, and
// how many bytes it wrote, or false if there is none.
func (q *Queue) Take() (head uint16, n uint32, ok bool) {
	if uint16(atomic.LoadUint32(q.word(q.used, 0))>>16) == q.lastUsed {
		return 0, 0, false
	}
	entry := q.used[4+8*int(q.lastUsed&(q.size-1)):]
	head = uint16(binary.LittleEndian.Uint32(entry))
	n = binary.LittleEndian.Uint32(entry[4:])
	q.lastUsed++
	q.free = append(q.free, q.chains[head]...)
	q.chains[head] = nil
	return head, n, true
}

// WantCall asks for an interrupt with the next chain given back, and reports
// whether there is one already.
func (q *Queue) WantCall() (more bool) {
	if q.eventIdx {
		binary.LittleEndian.PutUint16(q.avail[4+2*int(q.size):], q.lastUsed)
	}
	q.barrier.Add(1)
	return uint16(atomic.LoadUint32(q.word(q.used, 0))>>16) != q.lastUsed
}

// WaitCall waits for an interrupt. It returns os.ErrClosed after
// Machine.Close and os.ErrDeadlineExceeded after d, if that is not 0.
func (q *Queue) WaitCall(d time.Duration) error {
	var limit time.Time
	if d > 0 {
		limit = time.Now().Add(d)
	}
	if err := q.call.SetReadDeadline(limit); err != nil {
		return err
	}
	var b [8]byte
	if _, err := q.call.Read(b[:]); err != nil {
		return fmt.Errorf("interrupt of queue %d: %w", q.index, err)
	}
	return nil
}

// TakeWait is Take that waits for an interrupt, at most 10 s.
func (q *Queue) TakeWait() (head uint16, n uint32, err error) {
	for {
		if head, n, ok := q.Take(); ok {
			return head, n, nil
		}
		if q.WantCall() {
			continue
		}
		if err := q.WaitCall(timeout); err != nil {
			return 0, 0, err
		}
	}
}
