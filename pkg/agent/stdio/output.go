package stdio

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// output carries one of stdout and stderr: process → pipe → connection. The
// pipe is a nameless one whose write end the process gets, or a FIFO that the
// task service copies a terminal to.
type output struct {
	conn   Conn
	path   string   // of the FIFO, or empty
	pipe   *os.File // read end
	linger time.Duration

	// hold is the write end until somebody else has one: a reader that polls
	// a FIFO without a writer would take that for its end.
	hold     *os.File
	holdOnce sync.Once

	// ending is set once the task service is done with the process.
	ending atomic.Bool
	ended  chan struct{} // closed when nothing more is delivered
	done   chan struct{} // closed when nothing is open any more
}

// newOutput makes the output. An empty path means a nameless pipe.
func newOutput(path string, conn Conn, l Limits) (*output, error) {
	pipe, hold, err := openPipe(path)
	if err != nil {
		return nil, err
	}
	setPipeSize(pipe, l.PipeSize)
	return &output{
		conn: conn, path: path, pipe: pipe, hold: hold, linger: l.Linger,
		ended: make(chan struct{}), done: make(chan struct{}),
	}, nil
}

// openPipe returns both ends of a new FIFO, or of a nameless pipe.
func openPipe(path string) (read, write *os.File, err error) {
	if path == "" {
		return os.Pipe()
	}
	if err := makeFIFO(path); err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			os.Remove(path)
		}
	}()
	if read, err = openRead(path); err != nil {
		return nil, nil, err
	}
	if write, err = openHeld(path); err != nil {
		read.Close()
		return nil, nil, err
	}
	return read, write, nil
}

// release closes our own write end and removes the FIFO's name.
func (o *output) release() {
	o.holdOnce.Do(func() {
		o.hold.Close()
		if o.path != "" {
			os.Remove(o.path)
		}
	})
}

// start begins to deliver. Somebody else has a write end.
func (o *output) start() {
	o.release()
	go o.run()
}

// abandon closes an output that was not started.
func (o *output) abandon() {
	o.release()
	o.conn.Close()
	close(o.ended)
	o.ending.Store(true)
	go func() {
		defer close(o.done)
		o.discard()
	}()
}

// end bounds the rest: what the pipe holds now is delivered, each step in at
// most linger, and what is written later is not. A FIFO is read to its end,
// which the task service makes soon.
func (o *output) end() {
	o.ending.Store(true)
	now := time.Now()
	o.conn.SetDeadline(now.Add(o.linger))
	if o.path != "" {
		now = now.Add(o.linger)
	}
	o.pipe.SetReadDeadline(now)
}

// extend allows the next step its time, if steps are bounded already.
func (o *output) extend() {
	if o.ending.Load() {
		o.conn.SetDeadline(time.Now().Add(o.linger))
	}
}

func (o *output) run() {
	defer close(o.done)
	err := o.deliver()
	if err == nil {
		err = o.conn.CloseWrite()
	}
	close(o.ended)
	if err == nil {
		o.awaitHost()
	} else {
		log.L.WithError(err).Debug("output stream given up")
	}
	o.conn.Close()
	o.discard()
}

// deliver moves bytes to the host until the pipe ends or, after end, is empty.
func (o *output) deliver() error {
	src, err := newSource(o.pipe)
	if err != nil {
		return err
	}
	if canSpliceOut() {
		err := o.splice(src)
		if err != unix.EINVAL {
			return err
		}
	}
	return o.copy(src)
}

func (o *output) copy(src source) error {
	for {
		buf, n, err := src.next()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return o.sweep(src)
		}
		if err := o.send(buf, n, err); err != nil {
			return ignoreEOF(err)
		}
	}
}

// splice is deliver without a copy through this program. EINVAL means that the
// kernel cannot do it, and that nothing is lost.
func (o *output) splice(src source) error {
	conn, err := o.conn.SyscallConn()
	if err != nil {
		return err
	}
	for {
		err := awaitBytes(src.rc)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return o.sweep(src)
		}
		if err != nil {
			return err
		}
		o.extend()
		n, err := spliceOut(src.rc, conn)
		if err != nil || n == 0 {
			return err
		}
	}
}

// sweep delivers what is in the pipe now: at most what it can hold.
func (o *output) sweep(src source) error {
	for left := pipeSize(o.pipe); left > 0; {
		buf, n, err := src.poll()
		if err := o.send(buf, n, err); err != nil {
			return ignoreEOF(err)
		}
		left -= n
	}
	return nil
}

// send delivers what a read has returned. The end of the pipe is io.EOF.
func (o *output) send(buf *[bufferSize]byte, n int, err error) error {
	if n > 0 {
		o.extend()
		_, err = o.conn.Write(buf[:n])
	} else if err == nil {
		err = io.EOF
	}
	if buf != nil {
		buffers.Put(buf)
	}
	return err
}

func ignoreEOF(err error) error {
	if err == io.EOF {
		return nil
	}
	return err
}

// awaitHost returns when the host has closed its side, too: closing first
// could discard what the host has not read yet.
func (o *output) awaitHost() {
	o.extend()
	var b [64]byte
	for {
		if _, err := o.conn.Read(b[:]); err != nil {
			return
		}
	}
}

// discard takes what is still written after the host has gone, so that a full
// pipe does not block the process, and closes the pipe. After end it goes on
// only for a FIFO, whose other end is the task service's own.
func (o *output) discard() {
	defer o.pipe.Close()
	if o.ending.Load() {
		if o.path == "" {
			return
		}
		o.pipe.SetReadDeadline(time.Now().Add(o.linger))
	}
	io.Copy(io.Discard, o.pipe)
}
