package initramfs

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
)

const (
	magic = "070701"
	// headerSize is the magic and thirteen fields of eight hex digits.
	headerSize = len(magic) + 13*8
	// trailer is the name of the entry that ends an archive.
	trailer = "TRAILER!!!"
	// block is what cpio(1) pads an archive to.
	block    = 512
	maxField = 1<<32 - 1
	// maxName is the kernel's PATH_MAX, with the final NUL.
	maxName = 4096
	// maxData bounds what Read takes into memory for one entry.
	maxData = 1 << 30
)

// cpioWriter writes entries to w and counts the bytes.
type cpioWriter struct {
	w io.Writer
	n int64
}

func (c *cpioWriter) write(b []byte) error {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return err
}

// pad fills up to a multiple of align.
func (c *cpioWriter) pad(align int64) error {
	if r := c.n % align; r != 0 {
		return c.write(make([]byte, align-r))
	}
	return nil
}

func (c *cpioWriter) entry(ino uint32, e *Entry) error {
	links := uint32(1)
	if e.IsDir() {
		links = 2
	}
	return c.raw(e.Path, e.Data, [...]uint32{
		ino, e.Mode,
		0, 0, // owner and group
		links,
		0, // modification time
		uint32(len(e.Data)),
		0, 0, // device that holds the file
		e.Major, e.Minor,
	})
}

func (c *cpioWriter) raw(name string, data []byte, fields [11]uint32) error {
	h := make([]byte, 0, headerSize+len(name)+1)
	h = append(h, magic...)
	for _, f := range fields {
		h = fmt.Appendf(h, "%08X", f)
	}
	h = fmt.Appendf(h, "%08X%08X", len(name)+1, 0) // the checksum is unused
	h = append(h, name...)
	h = append(h, 0)
	if err := c.write(h); err != nil {
		return err
	}
	if err := c.pad(4); err != nil {
		return err
	}
	if err := c.write(data); err != nil {
		return err
	}
	return c.pad(4)
}

func (c *cpioWriter) end() error {
	if err := c.raw(trailer, nil, [11]uint32{4: 1}); err != nil {
		return err
	}
	return c.pad(block)
}

// Read returns the entries of an uncompressed archive in their order. It reads
// one archive; what a concatenation holds behind it is left unread.
func Read(r io.Reader) ([]Entry, error) {
	c := &cpioReader{r: bufio.NewReader(r)}
	var entries []Entry
	for {
		e, err := c.entry()
		if err != nil {
			return nil, fmt.Errorf("read cpio entry %d at byte %d: %w", len(entries)+1, c.n, err)
		}
		if e.Path == trailer {
			return entries, nil
		}
		entries = append(entries, *e)
	}
}

// cpioReader reads entries from r and counts the bytes.
type cpioReader struct {
	r *bufio.Reader
	n int64
}

func (c *cpioReader) read(n int) ([]byte, error) {
	// Memory grows with what is there, not with what a header claims.
	b, err := io.ReadAll(io.LimitReader(c.r, int64(n)))
	c.n += int64(len(b))
	if err == nil && len(b) < n {
		err = io.ErrUnexpectedEOF
	}
	return b, err
}

func (c *cpioReader) pad() error {
	_, err := c.read(int(-c.n & 3))
	return err
}

func (c *cpioReader) entry() (*Entry, error) {
	h, err := c.read(headerSize)
	if err != nil {
		return nil, err
	}
	if string(h[:len(magic)]) != magic {
		return nil, fmt.Errorf("magic %q: want %q", h[:len(magic)], magic)
	}
	var f [13]uint32
	for i := range f {
		s := string(h[len(magic)+8*i:][:8])
		v, err := strconv.ParseUint(s, 16, 32)
		if err != nil {
			return nil, fmt.Errorf("header field %d: %q is not a number", i, s)
		}
		f[i] = uint32(v)
	}
	size, nameSize := f[6], f[11]
	if nameSize < 2 || nameSize > maxName || size > maxData {
		return nil, fmt.Errorf("name of %d bytes and data of %d: out of bounds", nameSize, size)
	}
	name, err := c.read(int(nameSize))
	if err != nil {
		return nil, err
	}
	if err := c.pad(); err != nil {
		return nil, err
	}
	e := &Entry{Path: string(name[:nameSize-1]), Mode: f[1], Major: f[9], Minor: f[10]}
	if size > 0 {
		if e.Data, err = c.read(int(size)); err != nil {
			return nil, err
		}
	}
	return e, c.pad()
}
