package streaming

import (
	"bytes"
	"errors"
	"io"
	"os"
	"slices"
	"testing"
)

// process reads an input to its end.
type process struct {
	bytes.Buffer
	err error
}

func read(in *Input) <-chan *process {
	return run(func() *process {
		p := &process{}
		_, p.err = in.WriteTo(&p.Buffer)
		return p
	})
}

func TestInput(t *testing.T) {
	data := randomBytes(20 << 20)
	for _, first := range []string{"client", "process"} {
		t.Run(first+" comes first", func(t *testing.T) {
			s := serve(t, nil)
			var w io.WriteCloser
			if first == "client" {
				w = s.writer("a")
			}
			in := s.input("a")
			got := read(in)
			if first == "process" {
				w = s.writer("a")
			}
			if _, err := w.Write(data); err != nil {
				t.Fatal(err)
			}
			// CRI closes its end, then calls CloseIO on another connection.
			w.Close()
			in.CloseWrite()
			p := result(t, "process", got)
			if p.err != nil {
				t.Errorf("WriteTo() = %v; want nil", p.err)
			}
			sameBytes(t, "process", p.Bytes(), data)
		})
	}
}

// What a client has sent before it closes its connection is not lost, whichever
// ttrpc notices first.
func TestInputClosedAtOnce(t *testing.T) {
	s := serve(t, nil)
	for _, size := range []int{1, 1000, window, window + 1, 100_000} {
		data := randomBytes(size)
		for range 40 {
			in := s.input("a")
			got := read(in)
			w := s.writer("a")
			// In small pieces, which are many messages.
			for chunk := range slices.Chunk(data, 1+size/50) {
				if _, err := w.Write(chunk); err != nil {
					t.Fatal(err)
				}
			}
			w.Close()
			in.CloseWrite()
			sameBytes(t, "process", result(t, "process", got).Bytes(), data)
			in.Close()
		}
	}
}

// Without CloseWrite a client may go and another come.
func TestInputReopened(t *testing.T) {
	s := serve(t, nil)
	in := s.input("a")
	got := read(in)
	for _, text := range []string{"first ", "second ", "third"} {
		w := s.writer("a")
		io.WriteString(w, text)
		w.Close()
		eventually(t, "client has left", func() bool { c, _, _ := in.stream.state(); return !c })
	}
	waits(t, "input without a client", got)
	w := s.writer("a")
	in.CloseWrite()
	in.CloseWrite()
	waits(t, "input with a client", got)
	io.WriteString(w, ", fourth")
	w.Close()
	if p := result(t, "process", got); p.String() != "first second third, fourth" {
		t.Errorf("process read %q", p.String())
	}
}

func TestInputNeverOpened(t *testing.T) {
	s := serve(t, nil)
	in := s.input("a")
	got := read(in)
	waits(t, "input", got)
	in.CloseWrite()
	if p := result(t, "process", got); p.Len() != 0 || p.err != nil {
		t.Errorf("process read %q, %v; want the end", p.String(), p.err)
	}
}

// A process that does not read holds up its client, and not the shim's memory.
func TestProcessStopsReading(t *testing.T) {
	s := serve(t, nil)
	in := s.input("a")
	guest, w := io.Pipe()
	copied := run(func() error { _, err := in.WriteTo(w); return err })
	client := s.writer("a")
	sent := run(func() error { _, err := client.Write(make([]byte, 1<<20)); return err })
	waits(t, "client's write to a process that does not read", sent)
	in.stream.mu.Lock()
	held := len(in.stream.buf)
	in.stream.mu.Unlock()
	if held > window {
		t.Errorf("stream holds %d bytes; want at most %d", held, window)
	}
	// The process ends: its client must not wait for ever.
	guest.Close()
	if err := result(t, "WriteTo", copied); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("WriteTo() = %v; want the process's error", err)
	}
	waits(t, "client's write", sent)
	in.Discard()
	if err := result(t, "client's write", sent); err != nil {
		t.Errorf("client's write after Discard = %v; want nil", err)
	}
	if _, err := in.WriteTo(io.Discard); !errors.Is(err, os.ErrClosed) {
		t.Errorf("WriteTo() after Discard = %v; want os.ErrClosed", err)
	}
	// One that comes later is not held up either.
	client.Close()
	client = s.writer("a")
	if _, err := client.Write(make([]byte, 1<<20)); err != nil {
		t.Errorf("late client's write = %v; want nil", err)
	}
	client.Close()
}

func TestInputClose(t *testing.T) {
	s := serve(t, nil)
	in := s.input("a")
	got := read(in)
	st := s.open("a")
	in.Close()
	in.Close()
	if p := result(t, "process", got); !errors.Is(p.err, os.ErrClosed) {
		t.Errorf("WriteTo() after Close = %v; want os.ErrClosed", p.err)
	}
	for {
		_, err := st.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("client read %v; want the end", err)
		}
	}
	st.Close()
}
