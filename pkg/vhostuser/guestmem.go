package vhostuser

import (
	"sync/atomic"
	"unsafe"
)

// Ring indices are shared with a guest that runs at the same time, so they
// are accessed atomically. sync/atomic has no 16-bit values: an index is
// loaded with the aligned word around it, which lies in the same page of the
// region. Ring memory is not Go's: the collector and the race detector never
// see it.

// loadUint16 loads the little-endian number at b[off:], whose address must be
// even, with acquire semantics.
func loadUint16(b []byte, off int) uint16 {
	p := uintptr(unsafe.Pointer(&b[off : off+2][0]))
	high := p & 2
	word := (*uint32)(unsafe.Add(unsafe.Pointer(&b[off]), -int(high)))
	return uint16(atomic.LoadUint32(word) >> (high * 8))
}

// storeUint32 stores v at b[off:], whose address must be a multiple of 4,
// after everything that was written before.
func storeUint32(b []byte, off int, v uint32) {
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&b[off : off+4][0])), v)
}

// storeUint16 stores v at b[off:], whose address must be even, in one piece
// and in no order: a fence must follow.
func storeUint16(b []byte, off int, v uint16) {
	*(*uint16)(unsafe.Pointer(&b[off : off+2][0])) = v
}
