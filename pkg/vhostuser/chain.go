package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Descriptor flags (virtio 1.2, section 2.7.5).
const (
	descNext     = 1
	descWrite    = 2
	descIndirect = 4

	descSize = 16
)

// maxSegments bounds the pieces of one chain. Drivers stay below their queue
// size; indirect tables may be longer, with QEMU up to 1024.
const maxSegments = 1024

// Chain is one buffer that the driver has made available: first what the
// device may read, then what it may write. Its zero value is ready for
// Queue.Next, and using one Chain again and again saves allocations. The
// memory belongs to the guest, which may change it at any time, and is valid
// until the lock that guards the queue is released.
type Chain struct {
	Readable, Writable Segments

	head uint16
}

// Segments is a sequence of pieces of guest memory that is consumed from its
// front.
type Segments struct {
	pieces [][]byte
	first  int
	len    int
}

// Len returns the number of bytes left.
func (s *Segments) Len() int { return s.len }

// Next consumes and returns at most n bytes that lie together: none only if n
// or Len is 0.
func (s *Segments) Next(n int) []byte {
	if n <= 0 || s.len == 0 {
		return nil
	}
	p := s.pieces[s.first]
	if n < len(p) {
		s.pieces[s.first] = p[n:]
		p = p[:n]
	} else {
		s.first++
	}
	s.len -= len(p)
	return p
}

// Read consumes as many bytes as fit into p and returns their number.
func (s *Segments) Read(p []byte) int {
	n := 0
	for n < len(p) && s.len > 0 {
		n += copy(p[n:], s.Next(len(p)-n))
	}
	return n
}

// Write consumes as many bytes as p has, filling them, and returns their
// number, which is less than len(p) only if Len was.
func (s *Segments) Write(p []byte) int {
	n := 0
	for n < len(p) && s.len > 0 {
		n += copy(s.Next(len(p)-n), p[n:])
	}
	return n
}

func (s *Segments) reset() {
	clear(s.pieces)
	s.pieces, s.first, s.len = s.pieces[:0], 0, 0
}

// add appends n bytes at a guest address, which may span adjacent regions.
func (s *Segments) add(m *memory, addr uint64, n uint32) error {
	for n > 0 {
		p := m.guest(addr, n)
		if len(p) == 0 {
			return fmt.Errorf("%d bytes at guest address %#x: not memory", n, addr)
		}
		if len(s.pieces) == maxSegments {
			return fmt.Errorf("more than %d segments", maxSegments)
		}
		s.pieces = append(s.pieces, p)
		s.len += len(p)
		addr += uint64(len(p))
		n -= uint32(len(p))
	}
	return nil
}

// descriptor is a private copy of one of the guest's.
type descriptor struct {
	addr        uint64
	len         uint32
	flags, next uint16
}

// readDescriptor copies descriptor i out of a table before anything looks at
// it: the guest may change it in between.
func readDescriptor(table []byte, i uint16) descriptor {
	var b [descSize]byte
	copy(b[:], table[int(i)*descSize:])
	le := binary.LittleEndian
	return descriptor{
		addr:  le.Uint64(b[0:]),
		len:   le.Uint32(b[8:]),
		flags: le.Uint16(b[12:]),
		next:  le.Uint16(b[14:]),
	}
}

// walk fills c with the chain that begins at descriptor head of table.
// indirect says whether the driver may use indirect tables.
func (c *Chain) walk(m *memory, table []byte, head uint16, indirect bool) error {
	c.Readable.reset()
	c.Writable.reset()
	c.head = head
	inIndirect := false
	i, limit := head, len(table)/descSize
	// A chain that visits more descriptors than its table holds is a loop.
	for visited := 0; ; visited++ {
		if int(i) >= limit || visited == limit {
			return fmt.Errorf("descriptor %d, number %d of the chain, in a table of %d", i, visited, limit)
		}
		d := readDescriptor(table, i)
		if d.flags&descIndirect != 0 {
			if !indirect || inIndirect || d.flags&descNext != 0 {
				return fmt.Errorf("descriptor %d: flags %#x: indirect table not allowed", i, d.flags)
			}
			var err error
			if table, err = indirectTable(m, d); err != nil {
				return fmt.Errorf("descriptor %d: %w", i, err)
			}
			inIndirect = true
			i, limit, visited = 0, len(table)/descSize, -1
			continue
		}
		if err := c.add(m, d); err != nil {
			return fmt.Errorf("descriptor %d: %w", i, err)
		}
		if d.flags&descNext == 0 {
			return nil
		}
		i = d.next
	}
}

func (c *Chain) add(m *memory, d descriptor) error {
	if d.flags&descWrite != 0 {
		return c.Writable.add(m, d.addr, d.len)
	}
	if c.Writable.len > 0 {
		return errors.New("readable after writable")
	}
	return c.Readable.add(m, d.addr, d.len)
}

// indirectTable returns the table that an indirect descriptor points to.
func indirectTable(m *memory, d descriptor) ([]byte, error) {
	if d.len == 0 || d.len%descSize != 0 || d.len > maxSegments*descSize {
		return nil, fmt.Errorf("indirect table of %d bytes", d.len)
	}
	table := m.guest(d.addr, d.len)
	if len(table) < int(d.len) {
		return nil, fmt.Errorf("indirect table of %d bytes at guest address %#x: not memory", d.len, d.addr)
	}
	return table, nil
}
