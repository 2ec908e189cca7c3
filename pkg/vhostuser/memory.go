package vhostuser

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// memory is the guest memory that the front end has announced, mapped. It
// never changes; a new table makes a new memory.
type memory struct {
	regions []region
}

// region is one piece of guest memory. mem is size bytes long.
type region struct {
	guest, user, size uint64
	mem               []byte
	mapping           []byte
}

// maxAddress bounds region addresses and sizes far below overflow: no
// supported CPU has more physical address bits.
const maxAddress = 1 << 52

// newMemory maps one descriptor for each region. The descriptors stay the
// caller's.
func newMemory(specs []regionSpec, fds []int) (*memory, error) {
	if len(specs) != len(fds) {
		return nil, fmt.Errorf("%d memory regions with %d descriptors", len(specs), len(fds))
	}
	m := &memory{regions: make([]region, 0, len(specs))}
	for i, s := range specs {
		if err := m.add(s, fds[i]); err != nil {
			m.close()
			return nil, fmt.Errorf("memory region %d (%d bytes at %#x): %w", i, s.size, s.guest, err)
		}
	}
	return m, nil
}

func (m *memory) add(s regionSpec, fd int) error {
	page := uint64(os.Getpagesize())
	if s.size == 0 || s.size%page != 0 || s.offset%page != 0 || s.guest%page != 0 || s.user%page != 0 {
		return fmt.Errorf("not made of pages of %d bytes", page)
	}
	// Front-end addresses are user-space pointers, guest addresses physical.
	if s.size > maxAddress || s.guest > maxAddress-s.size || s.offset > maxAddress || s.user > -s.size {
		return fmt.Errorf("front-end address %#x, offset %#x: out of range", s.user, s.offset)
	}
	for _, r := range m.regions {
		if s.guest < r.guest+r.size && r.guest < s.guest+s.size {
			return fmt.Errorf("overlaps the region at %#x", r.guest)
		}
		if s.user-r.user < r.size || r.user-s.user < s.size {
			return fmt.Errorf("front-end address %#x overlaps the region at %#x", s.user, r.guest)
		}
	}
	align, err := checkFile(fd, s.offset+s.size)
	if err != nil {
		return err
	}
	// Huge pages are mapped whole, from a multiple of their size.
	start := s.offset &^ (align - 1)
	end := (s.offset + s.size + align - 1) &^ (align - 1)
	mapping, err := unix.Mmap(fd, int64(start), int(end-start), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	// A core dump of this process is not to hold the guest's memory.
	_ = unix.Madvise(mapping, unix.MADV_DONTDUMP)
	mem := mapping[s.offset-start:][:s.size:s.size]
	m.regions = append(m.regions, region{guest: s.guest, user: s.user, size: s.size, mem: mem, mapping: mapping})
	return nil
}

// checkFile returns the page size of a file that has, and will keep, at least
// size bytes: the seal makes that certain, where fstat alone would leave
// SIGBUS to whoever can truncate the file.
func checkFile(fd int, size uint64) (page uint64, err error) {
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil {
		return 0, fmt.Errorf("not a memfd: fcntl F_GET_SEALS: %w", err)
	}
	if seals&unix.F_SEAL_SHRINK == 0 {
		return 0, fmt.Errorf("memfd without F_SEAL_SHRINK (seals %#x)", seals)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, fmt.Errorf("fstat: %w", err)
	}
	if st.Size < 0 || uint64(st.Size) < size {
		return 0, fmt.Errorf("file of %d bytes: want at least %d", st.Size, size)
	}
	page = uint64(os.Getpagesize())
	if b := uint64(st.Blksize); b > page && b&(b-1) == 0 && b <= 1<<30 {
		page = b
	}
	return page, nil
}

// close unmaps all regions. No slice of them may be used any more.
func (m *memory) close() {
	if m == nil {
		return
	}
	for _, r := range m.regions {
		_ = unix.Munmap(r.mapping)
	}
	m.regions = nil
}

// guest returns guest memory from a physical address on: n bytes, or fewer
// where the region ends, or none where there is no region.
func (m *memory) guest(addr uint64, n uint32) []byte {
	for i := range m.regions {
		r := &m.regions[i]
		if off := addr - r.guest; off < r.size {
			return r.mem[off:][:min(uint64(n), r.size-off)]
		}
	}
	return nil
}

// user returns n bytes of guest memory by the front end's own address. They
// must lie in one region and at a multiple of align.
func (m *memory) user(addr, n, align uint64) ([]byte, error) {
	if addr%align != 0 {
		return nil, fmt.Errorf("address %#x: not a multiple of %d", addr, align)
	}
	if m != nil {
		for i := range m.regions {
			r := &m.regions[i]
			if off := addr - r.user; off < r.size && n <= r.size-off {
				return r.mem[off:][:n:n], nil
			}
		}
	}
	return nil, fmt.Errorf("address %#x: no memory region has %d bytes there", addr, n)
}
