package stdio

import (
	"context"
	"os"
	"sync"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// input carries stdin: connection → pipe → process. The pipe is a nameless one
// whose read end the process gets, or a FIFO that the task service copies to a
// terminal.
type input struct {
	conn     Conn
	path     string // of the FIFO, or empty
	pipeSize int
	done     chan struct{} // closed when nothing is open any more

	// hold is a nameless pipe's read end until the process has one.
	hold     *os.File
	holdOnce sync.Once

	ctx    context.Context // ends with end
	cancel context.CancelFunc

	mu    sync.Mutex
	pipe  *os.File // write end; a FIFO's once it is open
	ended bool
}

// newInput makes the input. An empty path means a nameless pipe.
func newInput(path string, conn Conn, l Limits) (_ *input, err error) {
	i := &input{conn: conn, path: path, pipeSize: l.PipeSize, done: make(chan struct{})}
	if path == "" {
		i.hold, i.pipe, err = os.Pipe()
	} else {
		err = makeFIFO(path)
	}
	if err != nil {
		return nil, err
	}
	i.ctx, i.cancel = context.WithCancel(context.Background())
	return i, nil
}

// release closes our own read end.
func (i *input) release() {
	i.holdOnce.Do(func() {
		if i.hold != nil {
			i.hold.Close()
		}
	})
}

// start begins to feed the process. closeStdin makes the task service close
// its own write end of a FIFO; it is called after the last byte.
func (i *input) start(closeStdin func()) {
	i.release()
	go i.run(closeStdin)
}

// abandon closes an input that was not started.
func (i *input) abandon() {
	i.release()
	i.end()
	if i.path != "" {
		// The task service may be waiting for a partner in open(2).
		if f, err := os.OpenFile(i.path, os.O_RDWR|unix.O_CLOEXEC, 0); err == nil {
			f.Close()
		}
		os.Remove(i.path)
	}
	close(i.done)
}

// end closes the input: there is no process to feed any more.
func (i *input) end() {
	i.mu.Lock()
	i.ended = true
	pipe := i.pipe
	i.mu.Unlock()
	i.cancel()
	i.conn.Close()
	if pipe != nil {
		pipe.Close()
	}
}

func (i *input) run(closeStdin func()) {
	defer close(i.done)
	defer i.conn.Close()
	pipe, err := i.open()
	if err != nil {
		return // ended meanwhile
	}
	defer pipe.Close()
	setPipeSize(pipe, i.pipeSize)
	if err := i.feed(pipe); err != nil {
		// Either the process has closed its stdin, which closing the
		// connection tells the host, or the host has gone.
		log.L.WithError(err).Debug("stdin stream given up")
		return
	}
	pipe.Close()
	if i.path != "" {
		closeStdin()
	}
}

// open returns the write end; that of a FIFO once the task service has the
// other.
func (i *input) open() (*os.File, error) {
	if i.path == "" {
		return i.pipe, nil
	}
	fifo, err := openWrite(i.ctx, i.path)
	os.Remove(i.path)
	if err != nil {
		return nil, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.ended {
		fifo.Close()
		return nil, os.ErrClosed
	}
	i.pipe = fifo
	return fifo, nil
}

// feed moves bytes until the host's half-close.
func (i *input) feed(pipe *os.File) error {
	if ok, err := spliceFrom(i.conn, pipe); ok {
		return err
	}
	return i.copy(pipe)
}

func (i *input) copy(pipe *os.File) error {
	src, err := newSource(i.conn)
	if err != nil {
		return err
	}
	for {
		buf, n, err := src.next()
		if n > 0 {
			_, err = pipe.Write(buf[:n])
		}
		if buf != nil {
			buffers.Put(buf)
		}
		if err != nil || n == 0 {
			return err
		}
	}
}
