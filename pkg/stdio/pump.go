package stdio

import (
	"errors"
	"io"
	"os"
	"sync"
	"time"
)

// bufferSize is what one read of a busy stream moves at most, and what a
// stalled stream holds. It has to do with wake-ups more than with copies: each
// costs a turn of the scheduler on a host whose processors the virtual machine
// keeps busy. idleSize is what an idle stream waits with, fifoSize what a
// client's FIFO is asked to hold: as many bytes as one buffer or more.
const (
	bufferSize = 128 << 10
	idleSize   = 512
	fifoSize   = 256 << 10
)

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// source is what can be read from with a deadline: a connection or a FIFO.
type source interface {
	io.Reader
	SetReadDeadline(t time.Time) error
}

// fromGuest copies what conn receives until it ends. A connection that can
// write by itself needs no buffer here.
func fromGuest(dst io.Writer, conn Conn, idle time.Duration) error {
	if w, ok := conn.(io.WriterTo); ok {
		_, err := w.WriteTo(dst)
		return err
	}
	return copyStream(dst, conn, idle)
}

// toGuest sends what src has until it ends.
func toGuest(conn Conn, src source, idle time.Duration) error {
	if r, ok := conn.(io.ReaderFrom); ok {
		_, err := r.ReadFrom(src)
		return err
	}
	return copyStream(conn, src, idle)
}

// copyStream copies until src ends, which is no error. While src is silent for
// longer than idle it has no more than idleSize bytes in use: most streams of
// most containers are silent nearly always.
func copyStream(dst io.Writer, src source, idle time.Duration) error {
	small := make([]byte, idleSize)
	for {
		n, err := src.Read(small)
		if n > 0 {
			if _, err := dst.Write(small[:n]); err != nil {
				return err
			}
		}
		if err == nil {
			err = copyBusy(dst, src, idle)
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}

// copyBusy copies through a whole buffer until src was silent for idle to
// twice idle, which is no error. The deadline is set once in a while instead
// of for each read. A source that knows no deadlines, such as a regular file,
// stays busy.
func copyBusy(dst io.Writer, src source, idle time.Duration) error {
	buf := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buf)
	for {
		src.SetReadDeadline(time.Now().Add(idle))
		moved, err := copyUntilError(dst, src, buf[:])
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if !moved {
			return src.SetReadDeadline(time.Time{})
		}
	}
}

// copyUntilError returns the first error, which for a source's end is io.EOF,
// and whether anything was read before.
func copyUntilError(dst io.Writer, src io.Reader, buf []byte) (moved bool, err error) {
	for {
		n, err := src.Read(buf)
		if n > 0 {
			moved = true
			if _, err := dst.Write(buf[:n]); err != nil {
				return moved, err
			}
		}
		if err != nil {
			return moved, err
		}
	}
}

// delivery writes to an output and carries on when the output refuses: the
// process must not block on it. Only a closed output is an error.
type delivery struct {
	dst io.Writer
	// refused is called with the first error.
	refused func(error)
	dropped int64
}

func (d *delivery) Write(p []byte) (int, error) {
	n, err := d.dst.Write(p)
	if errors.Is(err, os.ErrClosed) {
		return n, err
	}
	if err != nil {
		if d.dropped == 0 {
			d.refused(err)
		}
		d.dropped += int64(len(p) - n)
	}
	return len(p), nil
}
