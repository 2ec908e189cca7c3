package streaming

import (
	"io"
	"os"
)

// Input is a stream that a process reads from.
type Input struct {
	service *Service
	stream  *stream
}

var _ io.WriterTo = (*Input)(nil)

// WriteTo copies what clients send to w until the input has ended, which is no
// error. It returns os.ErrClosed after Discard or Close.
func (in *Input) WriteTo(w io.Writer) (int64, error) {
	var total int64
	var buf []byte
	for {
		var err error
		if buf, err = in.stream.take(buf[:0]); err != nil || len(buf) == 0 {
			return total, err
		}
		in.stream.grant()
		n, err := w.Write(buf)
		total += int64(n)
		if err != nil {
			return total, err
		}
	}
}

// take waits for bytes and returns them; none at the end. spare becomes the
// buffer for the next ones, if there are some at once: an idle stream keeps
// none.
func (st *stream) take(spare []byte) ([]byte, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for st.mode == input {
		if len(st.buf) > 0 {
			p := st.buf
			st.buf = spare
			st.touch()
			return p, nil
		}
		if st.released && st.client == nil {
			return nil, nil
		}
		spare, st.buf = nil, nil
		changed := st.changed
		st.mu.Unlock()
		await(changed, 0)
		st.mu.Lock()
	}
	return nil, os.ErrClosed
}

// CloseWrite says that no further client will come: the input ends with the
// one that is there. Idempotent.
func (in *Input) CloseWrite() {
	in.stream.mu.Lock()
	defer in.stream.mu.Unlock()
	in.stream.released = true
	in.stream.touch()
}

// Discard says that the process reads no more. What clients send from now on
// is dropped.
func (in *Input) Discard() {
	st := in.stream
	st.mu.Lock()
	if st.mode == input {
		st.mode = discarding
	}
	st.buf = nil
	st.touch()
	st.mu.Unlock()
	st.grant()
}

// Close gives the stream up and ends the client. Idempotent.
func (in *Input) Close() { in.service.release(in.stream) }
