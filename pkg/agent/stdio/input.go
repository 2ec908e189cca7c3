package stdio

import (
	"context"
	"os"
	"sync"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// input carries stdin: connection → FIFO → (task service) → process.
type input struct {
	conn     Conn
	path     string
	pipeSize int
	done     chan struct{} // closed when nothing is open any more

	ctx    context.Context // ends with end or abort
	cancel context.CancelFunc

	mu      sync.Mutex
	started bool
	ended   bool
	fifo    *os.File // write end, once open
}

func newInput(path string, conn Conn, l Limits) (*input, error) {
	if err := makeFIFO(path); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	return &input{
		conn: conn, path: path, pipeSize: l.PipeSize,
		done: make(chan struct{}), ctx: ctx, cancel: cancel,
	}, nil
}

// start begins to feed the process. closeStdin makes the task service close
// its own write end of the FIFO; it is called after the last byte.
func (i *input) start(closeStdin func()) {
	i.mu.Lock()
	first := !i.started && !i.ended
	i.started = i.started || first
	i.mu.Unlock()
	if first {
		go i.run(closeStdin)
	}
}

// end closes the input: there is no process to feed any more.
func (i *input) end() {
	i.mu.Lock()
	first := !i.ended
	i.ended = true
	started, fifo := i.started, i.fifo
	i.mu.Unlock()
	if !first {
		return
	}
	i.cancel()
	i.conn.Close()
	if fifo != nil {
		fifo.Close()
	}
	if !started {
		// The task service may be waiting for a partner in open(2).
		if f, err := os.OpenFile(i.path, os.O_RDWR|unix.O_CLOEXEC, 0); err == nil {
			f.Close()
		}
		os.Remove(i.path)
		close(i.done)
	}
}

func (i *input) run(closeStdin func()) {
	defer close(i.done)
	defer i.conn.Close()
	fifo, err := openWrite(i.ctx, i.path)
	os.Remove(i.path)
	if err != nil {
		return
	}
	defer fifo.Close()
	i.mu.Lock()
	i.fifo = fifo
	ended := i.ended
	i.mu.Unlock()
	if ended {
		return
	}
	setPipeSize(fifo, i.pipeSize)
	if err := i.feed(fifo); err != nil {
		// Either the process has closed its stdin, which closing the
		// connection tells the host, or the host has gone.
		log.L.WithError(err).Debugf("stream of %s given up", i.path)
		return
	}
	fifo.Close()
	closeStdin()
}

// feed copies until the host's half-close.
func (i *input) feed(fifo *os.File) error {
	src, err := newSource(i.conn)
	if err != nil {
		return err
	}
	for {
		buf, n, err := src.next()
		if n > 0 {
			_, err = fifo.Write(buf[:n])
		}
		if buf != nil {
			buffers.Put(buf)
		}
		if err != nil || n == 0 {
			return err
		}
	}
}
