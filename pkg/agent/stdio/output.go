package stdio

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/log"
)

// output carries one of stdout and stderr: process → (task service) → FIFO →
// connection.
//
// Until start, hold is a write end of our own: a reader that polls a FIFO
// without a writer would take that for its end.
type output struct {
	conn   Conn
	path   string
	fifo   *os.File // read end
	linger time.Duration

	// lingering is set once the stream may no longer wait without bound.
	lingering atomic.Bool
	done      chan struct{} // closed when nothing is open any more

	mu   sync.Mutex
	hold *os.File // nil once started or closed
}

func newOutput(path string, conn Conn, l Limits) (_ *output, err error) {
	if err := makeFIFO(path); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			os.Remove(path)
		}
	}()
	fifo, err := openRead(path)
	if err != nil {
		return nil, err
	}
	hold, err := openHeld(path)
	if err != nil {
		fifo.Close()
		return nil, err
	}
	setPipeSize(fifo, l.PipeSize)
	return &output{
		conn: conn, path: path, fifo: fifo, hold: hold,
		linger: l.Linger, done: make(chan struct{}),
	}, nil
}

// release closes our own write end and removes the FIFO's name, and reports
// whether it was the first to do so.
func (o *output) release() bool {
	o.mu.Lock()
	hold := o.hold
	o.hold = nil
	o.mu.Unlock()
	if hold == nil {
		return false
	}
	hold.Close()
	os.Remove(o.path)
	return true
}

// start begins to deliver. The task service has opened its ends.
func (o *output) start() {
	if o.release() {
		go o.run()
	}
}

// abort closes an output that was not started. The FIFO is drained first, in
// case the task service opened it before it gave up.
func (o *output) abort() {
	if !o.release() {
		return
	}
	o.conn.Close()
	o.lingering.Store(true)
	go o.finish()
}

// end bounds the rest: the task service writes no more, and each step of what
// is left may take at most linger.
func (o *output) end() {
	o.lingering.Store(true)
	deadline := time.Now().Add(o.linger)
	o.conn.SetDeadline(deadline)
	o.fifo.SetReadDeadline(deadline)
}

// extend allows the next step its time, if steps are bounded already.
func (o *output) extend() {
	if o.lingering.Load() {
		o.end()
	}
}

func (o *output) run() {
	err := o.deliver()
	if err == nil {
		err = o.conn.CloseWrite()
	}
	if err == nil {
		o.awaitHost()
	} else if !errors.Is(err, os.ErrDeadlineExceeded) {
		log.L.WithError(err).Debugf("stream of %s given up", o.path)
	}
	o.conn.Close()
	o.finish()
}

// deliver copies to the host until the FIFO ends.
func (o *output) deliver() error {
	src, err := newSource(o.fifo)
	if err != nil {
		return err
	}
	for {
		buf, n, err := src.next()
		if n > 0 {
			o.extend()
			_, err = o.conn.Write(buf[:n])
		}
		if buf != nil {
			buffers.Put(buf)
		}
		if err != nil || n == 0 {
			return err
		}
	}
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

// finish discards what the process still writes after the host has gone, so
// that it is not blocked by a full FIFO, and closes.
func (o *output) finish() {
	if o.lingering.Load() {
		o.fifo.SetReadDeadline(time.Now().Add(o.linger))
	}
	io.Copy(io.Discard, o.fifo)
	o.fifo.Close()
	close(o.done)
}
