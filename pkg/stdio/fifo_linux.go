package stdio

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// handle refers to a file without opening it, so that what was looked at is
// what gets opened, any number of times and even after the path was removed.
type handle struct {
	f    *os.File
	fifo bool
}

func openHandle(path string) (*handle, error) {
	f, err := os.OpenFile(path, unix.O_PATH, 0)
	if err != nil {
		return nil, cause(err)
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, cause(err)
	}
	return &handle{f: f, fifo: fi.Mode().Type() == fs.ModeNamedPipe}, nil
}

func (h *handle) close() { h.f.Close() }

func (h *handle) open(flag int) (*os.File, error) {
	f, err := os.OpenFile(h.path(), flag, 0)
	if err != nil {
		return nil, cause(err)
	}
	return f, nil
}

func (h *handle) path() string { return fmt.Sprintf("/proc/self/fd/%d", h.f.Fd()) }

// hold opens an end of a FIFO whose other end is open in this process, only to
// keep it open. It stays out of the runtime's poller, which would else wake up
// for every transfer.
func (h *handle) hold(flag int) (*os.File, error) {
	for {
		fd, err := unix.Open(h.path(), flag|unix.O_CLOEXEC, 0)
		switch err {
		case nil:
			return os.NewFile(uintptr(fd), h.f.Name()), nil
		case unix.EINTR:
		default:
			return nil, err
		}
	}
}

// fileInput is a FIFO, or any file.
type fileInput struct {
	h *handle
	// after delays the opening until it is closed; nil does not.
	after <-chan struct{}
	done  chan struct{} // closed by close

	mu               sync.Mutex
	released, closed bool
	r                *os.File // nil before the opening
	// writer is a write end of the FIFO: while it is open the FIFO does not
	// end, whatever clients come and go. Nil with other files, and once
	// released.
	writer *os.File
}

// newFileInput makes sure of the file, and opens it unless that is to be done
// after something else. It does not wait for a writer.
func newFileInput(path string, after <-chan struct{}) (*fileInput, error) {
	h, err := openHandle(path)
	if err != nil {
		return nil, err
	}
	in := &fileInput{h: h, after: after, done: make(chan struct{})}
	if after == nil {
		if err := in.open(); err != nil {
			in.close()
			return nil, err
		}
	}
	return in, nil
}

func (in *fileInput) open() error {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed {
		return os.ErrClosed
	}
	if in.r != nil {
		return nil
	}
	r, err := in.h.open(os.O_RDONLY | unix.O_NONBLOCK)
	if err != nil {
		return err
	}
	if in.h.fifo {
		widen(r)
	}
	if in.h.fifo && !in.released {
		if in.writer, err = in.h.hold(unix.O_WRONLY); err != nil {
			r.Close()
			return err
		}
	}
	in.r = r
	return nil
}

func (in *fileInput) copyTo(conn Conn, idle time.Duration) error {
	if in.after != nil {
		select {
		case <-in.after:
		case <-in.done:
			return os.ErrClosed
		}
		if err := in.open(); err != nil {
			return err
		}
	}
	return toGuest(conn, in.r, idle)
}

// release lets the FIFO end with the last client.
func (in *fileInput) release() error {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.released = true
	if in.writer == nil {
		return nil
	}
	err := in.writer.Close()
	in.writer = nil
	return err
}

// finish lets a client that still writes read EPIPE.
func (in *fileInput) finish() { in.close() }

func (in *fileInput) close() {
	in.release()
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed {
		return
	}
	in.closed = true
	close(in.done)
	in.h.close()
	if in.r != nil {
		in.r.Close()
	}
}

// openOutput opens a FIFO for writing once it has a reader, or any other file
// for appending.
//
// A read end is held open as well: a client that goes away and comes back (a
// restart of containerd, for one) costs the process neither an EPIPE nor a
// byte of what the FIFO holds. It must not be opened before the client's
// reader is there, since a FIFO that nobody else opens takes its content with
// it when it is closed.
func openOutput(ctx context.Context, path string) (output, error) {
	h, err := openHandle(path)
	if err != nil {
		return nil, err
	}
	defer h.close()
	if !h.fifo {
		f, err := h.open(os.O_WRONLY | os.O_APPEND)
		if err != nil {
			return nil, err
		}
		return files{f}, nil
	}
	// fifo(7): without a reader ENXIO. A reader that still waits in open(2)
	// for a writer counts.
	w, err := h.open(os.O_WRONLY | unix.O_NONBLOCK)
	if errors.Is(err, unix.ENXIO) {
		w, err = h.awaitReader(ctx)
	}
	if err != nil {
		return nil, err
	}
	r, err := h.hold(unix.O_RDONLY)
	if err != nil {
		w.Close()
		return nil, err
	}
	widen(w)
	return files{w, r}, nil
}

// widen asks for a FIFO of fifoSize. The kernel allocates it as it fills, and
// a smaller one, where it refuses, works as well.
func widen(f *os.File) {
	if rc, err := f.SyscallConn(); err == nil {
		rc.Control(func(fd uintptr) { unix.FcntlInt(fd, unix.F_SETPIPE_SZ, fifoSize) })
	}
}

// awaitReader opens the FIFO for writing as soon as it has a reader. There is
// no other event for that than open(2) itself, which blocks a thread.
func (h *handle) awaitReader(ctx context.Context) (*os.File, error) {
	type result struct {
		f   *os.File
		err error
	}
	opened := make(chan result, 1)
	go func() {
		f, err := h.open(os.O_WRONLY)
		opened <- result{f, err}
	}()
	select {
	case r := <-opened:
		return r.f, r.err
	case <-ctx.Done():
	}
	// A reader of our own ends the wait. It has to stay until then: the
	// other thread may not have reached open(2) yet.
	reader, err := h.hold(unix.O_RDONLY | unix.O_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("cancel wait for a reader: %w", err)
	}
	defer reader.Close()
	if r := <-opened; r.err == nil {
		r.f.Close()
	}
	return nil, fmt.Errorf("no reader: %w", ctx.Err())
}
