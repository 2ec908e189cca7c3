package stdio

import (
	"context"
	"fmt"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// bufferSize is what one read moves at most. Idle streams hold no buffer.
const bufferSize = 256 << 10

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// makeFIFO creates the FIFO path. Only the agent opens it, hence mode 0600.
func makeFIFO(path string) error {
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return &os.PathError{Op: "mkfifo", Path: path, Err: err}
	}
	return nil
}

// openRead opens the read end of a FIFO without waiting for a writer.
func openRead(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
}

// openHeld opens a write end while a read end is open in this process.
func openHeld(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
}

// openWrite opens the write end of a FIFO and returns once another opener has
// its read end, or ctx has ended. That the return means "there is a reader" is
// what lets end of file and EPIPE be trusted from then on.
func openWrite(ctx context.Context, path string) (*os.File, error) {
	type result struct {
		f   *os.File
		err error
	}
	opened := make(chan result, 1)
	go func() {
		f, err := os.OpenFile(path, os.O_WRONLY|unix.O_CLOEXEC, 0)
		opened <- result{f, err}
	}()
	select {
	case r := <-opened:
		return r.f, r.err
	case <-ctx.Done():
	}
	// open(2) is waiting in the kernel: a reader of our own ends that. The
	// path is still there, because only the caller removes it.
	reader, err := openRead(path)
	if err != nil {
		return nil, fmt.Errorf("cancel open: %w", err)
	}
	defer reader.Close()
	if r := <-opened; r.err == nil {
		r.f.Close()
	}
	return nil, ctx.Err()
}

// setPipeSize asks for a pipe of n bytes. A smaller one works as well, so an
// error is none.
func setPipeSize(f *os.File, n int) {
	if n <= 0 {
		return
	}
	if rc, err := f.SyscallConn(); err == nil {
		rc.Control(func(fd uintptr) {
			unix.FcntlInt(fd, unix.F_SETPIPE_SZ, n)
		})
	}
}

// pipeSize returns what a pipe can hold, in bytes.
func pipeSize(f *os.File) int {
	size := 0
	if rc, err := f.SyscallConn(); err == nil {
		rc.Control(func(fd uintptr) {
			size, _ = unix.FcntlInt(fd, unix.F_GETPIPE_SZ, 0)
		})
	}
	return size
}

// source reads from a descriptor in non-blocking mode into a buffer that is
// taken only once there is something to read.
type source struct{ rc syscall.RawConn }

func newSource(c syscall.Conn) (source, error) {
	rc, err := c.SyscallConn()
	return source{rc}, err
}

// next waits for bytes, an end (n = 0) or an error. buf is the caller's to
// put back into buffers unless it is nil.
func (s source) next() (buf *[bufferSize]byte, n int, err error) {
	waitErr := s.rc.Read(func(fd uintptr) bool {
		buf, n, err = readOnce(int(fd))
		return err != unix.EAGAIN
	})
	if waitErr != nil {
		return nil, 0, waitErr
	}
	return buf, n, err
}

// poll is next without waiting and whatever the deadline: n is 0 if there is
// nothing to read now.
func (s source) poll() (buf *[bufferSize]byte, n int, err error) {
	ctlErr := s.rc.Control(func(fd uintptr) {
		buf, n, err = readOnce(int(fd))
	})
	switch {
	case ctlErr != nil:
		return nil, 0, ctlErr
	case err == unix.EAGAIN:
		return nil, 0, nil
	}
	return buf, n, err
}

// readOnce makes one read. buf is nil when there is nothing in it.
func readOnce(fd int) (*[bufferSize]byte, int, error) {
	buf := buffers.Get().(*[bufferSize]byte)
	for {
		n, err := unix.Read(fd, buf[:])
		if err == unix.EINTR {
			continue
		}
		if n > 0 {
			return buf, n, nil
		}
		buffers.Put(buf)
		return nil, 0, err
	}
}
