package vhostuser

import (
	"encoding/binary"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
)

// twoRegions is memory of two adjacent regions, which are not adjacent for
// this process, and one apart.
func twoRegions() *memory {
	m := &memory{}
	for _, r := range []struct{ guest, size uint64 }{{0, 4096}, {4096, 4096}, {16384, 4096}} {
		m.regions = append(m.regions, region{guest: r.guest, user: 1<<40 + r.guest, size: r.size, mem: make([]byte, r.size)})
	}
	return m
}

func TestSegmentsOverRegions(t *testing.T) {
	m := twoRegions()
	var s Segments
	if err := s.add(m, 4090, 12); err != nil {
		t.Fatalf("add(4090, 12) = %v; want nil", err)
	}
	if got, want := s.Len(), 12; got != want {
		t.Errorf("Len() = %d; want %d", got, want)
	}
	if n := s.Write([]byte("0123456789abcdef")); n != 12 {
		t.Errorf("Write(16 bytes) = %d; want 12", n)
	}
	got := string(m.regions[0].mem[4090:]) + string(m.regions[1].mem[:6])
	if want := "0123456789ab"; got != want {
		t.Errorf("memory = %q; want %q", got, want)
	}
	s.reset()
	if err := s.add(m, 8190, 3); err == nil {
		t.Error("add into the hole = nil; want an error")
	}
}

func TestSegmentsInPieces(t *testing.T) {
	m := twoRegions()
	copy(m.regions[0].mem, "abcdefgh")
	var s Segments
	for _, d := range []struct {
		addr uint64
		n    uint32
	}{{0, 3}, {3, 0}, {3, 1}, {4, 4}} {
		if err := s.add(m, d.addr, d.n); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for s.Len() > 0 {
		got = append(got, string(s.Next(2)))
	}
	if diff := cmp.Diff([]string{"ab", "c", "d", "ef", "gh"}, got); diff != "" {
		t.Errorf("Next(2) until empty (-want +got):\n%s", diff)
	}
	if p := s.Next(1); p != nil {
		t.Errorf("Next(1) of nothing = %q; want nothing", p)
	}
}

func TestTooManySegments(t *testing.T) {
	m := twoRegions()
	var s Segments
	for range maxSegments {
		if err := s.add(m, 0, 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.add(m, 0, 1); err == nil {
		t.Errorf("segment %d = nil; want an error", maxSegments+1)
	}
}

func TestUserAddress(t *testing.T) {
	m := twoRegions()
	for _, tc := range []struct {
		name           string
		addr, n, align uint64
		ok             bool
	}{
		{"all", 1 << 40, 4096, 16, true},
		{"end", 1<<40 + 4092, 4, 4, true},
		{"odd", 1<<40 + 1, 4, 2, false},
		{"over the end", 1<<40 + 4092, 8, 4, false},
		{"below", 1<<40 - 16, 4, 4, false},
		{"wraps", 1 << 40, 1<<64 - 1, 4, false},
		{"guest's own", 0, 4, 4, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if b, err := m.user(tc.addr, tc.n, tc.align); (err == nil) != tc.ok || err == nil && uint64(len(b)) != tc.n {
				t.Errorf("user(%#x, %d, %d) = %d bytes, %v; want success %t", tc.addr, tc.n, tc.align, len(b), err, tc.ok)
			}
		})
	}
	var none *memory
	if _, err := none.user(0, 1, 1); err == nil {
		t.Error("user of no memory = nil; want an error")
	}
}

// inside reports whether p lies in one of m's regions.
func inside(m *memory, p []byte) bool {
	at := uintptr(unsafe.Pointer(unsafe.SliceData(p)))
	for _, r := range m.regions {
		start := uintptr(unsafe.Pointer(unsafe.SliceData(r.mem)))
		if at >= start && at+uintptr(len(p)) <= start+uintptr(r.size) {
			return true
		}
	}
	return false
}

// Where FuzzChain puts the rings: their addresses for the front end.
const (
	fuzzDesc  = 1 << 40
	fuzzAvail = 1<<40 + 128
	fuzzUsed  = 1<<40 + 256
)

// desc encodes one descriptor.
func desc(addr uint64, n uint32, flags, next uint16) []byte {
	le := binary.LittleEndian
	b := le.AppendUint64(nil, addr)
	b = le.AppendUint32(b, n)
	b = le.AppendUint16(b, flags)
	return le.AppendUint16(b, next)
}

// ring encodes a page with descriptors at its start and heads that are
// available.
func ring(heads []uint16, descs ...[]byte) []byte {
	b := make([]byte, 4096)
	for i, d := range descs {
		copy(b[descSize*i:], d)
	}
	le := binary.LittleEndian
	le.PutUint16(b[128+2:], uint16(len(heads)))
	for i, h := range heads {
		le.PutUint16(b[128+4+2*i:], h)
	}
	return b
}

// FuzzChain takes chains from a queue in memory of any content. Every piece of
// every chain must be guest memory, and taking them must end.
func FuzzChain(f *testing.F) {
	f.Add(uint16(0), ring([]uint16{0, 2}, desc(4090, 12, descNext, 1), desc(16384, 100, descWrite, 0), desc(0, 1, 0, 0)))
	f.Add(uint16(0), ring([]uint16{0}, desc(0, 1, descNext, 1), desc(0, 1, descNext, 0)))
	f.Add(uint16(0), ring([]uint16{0}, desc(512, 4096-512, descIndirect, 0)))
	f.Add(uint16(0), ring([]uint16{1}, desc(0, 1, 0, 0), desc(16, 32, descIndirect, 0)))
	f.Add(uint16(0), ring([]uint16{0}, desc(0, 1<<32-1, 0, 0)))
	f.Add(uint16(0), ring([]uint16{0}, desc(1<<64-1, 2, descWrite, 0)))
	f.Add(uint16(0xfff8), ring([]uint16{9}, nil))
	f.Add(uint16(5), ring([]uint16{0}, nil))
	f.Fuzz(func(t *testing.T, base uint16, page []byte) {
		m := twoRegions()
		copy(m.regions[0].mem, page)
		q := &Queue{
			size: 8, addr: vringAddr{desc: fuzzDesc, avail: fuzzAvail, used: fuzzUsed},
			call: noEventFD, err: noEventFD, nextAvail: base,
		}
		if err := q.start(m, ringFeatures); err != nil {
			t.Fatal(err)
		}
		var c Chain
		for taken := 0; ; taken++ {
			if taken > 1<<16 {
				t.Fatal("there is always one more chain")
			}
			ok, err := q.Next(&c)
			if err != nil {
				break
			}
			if !ok {
				if q.WantKick() {
					continue
				}
				break
			}
			n := 0
			for _, s := range []*Segments{&c.Readable, &c.Writable} {
				if len(s.pieces) > maxSegments {
					t.Fatalf("%d segments; want at most %d", len(s.pieces), maxSegments)
				}
				for s.Len() > 0 {
					p := s.Next(1 << 20)
					if !inside(m, p) || cap(p) > 4096 {
						t.Fatalf("segment of %d bytes is not guest memory", len(p))
					}
					n += len(p)
				}
			}
			q.Done(&c, uint32(n))
			q.Flush()
		}
		q.stop()
	})
}
