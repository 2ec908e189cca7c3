package vsock

import "github.com/vmrt/vmrt/pkg/vhostuser"

// chunkData makes a chunk fill an allocation of 16 KiB exactly.
const chunkData = 16<<10 - 16

// chunk is one piece of a fifo. Bytes from r to w are in use.
type chunk struct {
	next *chunk
	r, w uint32
	data [chunkData]byte
}

// maxFree bounds the chunks that a pool keeps.
const maxFree = 16

// pool keeps a few chunks for reuse. The Device's mutex guards it.
type pool struct {
	free *chunk
	n    int
}

func (p *pool) get() *chunk {
	c := p.free
	if c == nil {
		return new(chunk)
	}
	p.free, c.next = c.next, nil
	p.n--
	return c
}

func (p *pool) put(c *chunk) {
	if p.n == maxFree {
		return
	}
	c.r, c.w, c.next = 0, 0, p.free
	p.free = c
	p.n++
}

// fifo holds bytes received and not yet read, in as many chunks as they need.
type fifo struct {
	head, tail *chunk
	len        int
}

// fill appends n bytes taken from s, which has as many.
func (f *fifo) fill(p *pool, s *vhostuser.Segments, n int) {
	f.len += n
	for n > 0 {
		if f.tail == nil || f.tail.w == chunkData {
			c := p.get()
			if f.tail == nil {
				f.head = c
			} else {
				f.tail.next = c
			}
			f.tail = c
		}
		t := f.tail
		k := s.Read(t.data[t.w:][:min(n, int(chunkData-t.w))])
		t.w += uint32(k)
		n -= k
	}
}

// read moves as many bytes as fit into b and returns their number.
func (f *fifo) read(p *pool, b []byte) int {
	n := 0
	for n < len(b) && f.len > 0 {
		h := f.head
		k := copy(b[n:], h.data[h.r:h.w])
		h.r += uint32(k)
		n += k
		f.len -= k
		if h.r == h.w {
			f.drop(p)
		}
	}
	return n
}

// drop gives the first chunk back.
func (f *fifo) drop(p *pool) {
	h := f.head
	f.head = h.next
	if f.head == nil {
		f.tail = nil
	}
	p.put(h)
}

// clear gives everything back.
func (f *fifo) clear(p *pool) {
	for f.head != nil {
		f.drop(p)
	}
	f.len = 0
}
