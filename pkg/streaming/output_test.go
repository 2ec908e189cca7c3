package streaming

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/transfer/streaming"
	"github.com/containerd/errdefs"
)

func TestOutput(t *testing.T) {
	data := randomBytes(20 << 20)
	for _, first := range []string{"client", "process"} {
		t.Run(first+" comes first", func(t *testing.T) {
			s := serve(t, nil)
			var got <-chan []byte
			if first == "client" {
				got = readAll(s.reader("web-stdout"))
			}
			o := s.output("web-stdout")
			written := write(o, data)
			if first == "process" {
				waits(t, "Write() without a client", written)
				if o.Visited() || o.Connected() {
					t.Errorf("Visited, Connected = %v, %v before a client came", o.Visited(), o.Connected())
				}
				got = readAll(s.reader("web-stdout"))
			}
			if err := result(t, "Write", written); err != nil {
				t.Fatalf("Write() = %v; want nil", err)
			}
			o.Finish()
			if !o.Visited() {
				t.Error("Visited() = false after a client came")
			}
			sameBytes(t, "client", result(t, "client", got), data)
		})
	}
}

// The end comes after the last byte and again for a client that comes later.
func TestFinish(t *testing.T) {
	s := serve(t, func(l *limits) { l.farewell = patience })
	o := s.output("a")
	r := s.reader("a")
	if _, err := o.Write([]byte("text")); err != nil {
		t.Fatal(err)
	}
	finished := run(func() error { o.Finish(); return nil })
	// The client has not read yet.
	waits(t, "Finish() before the client has read", finished)
	if got := string(result(t, "client", readAll(r))); got != "text" {
		t.Errorf("client read %q; want text", got)
	}
	result(t, "Finish", finished)
	for range 2 {
		if got := string(result(t, "client", readAll(s.reader("a")))); got != "" {
			t.Errorf("late client read %q; want nothing", got)
		}
	}
}

func TestFinishDoesNotWaitForEver(t *testing.T) {
	s := serve(t, func(l *limits) { l.farewell = 20 * time.Millisecond })
	o := s.output("a")
	result(t, "Finish without a client", run(func() error { o.Finish(); return nil }))
	o = s.output("b")
	r := s.reader("b")
	defer r.Close()
	result(t, "Finish with a client that keeps its connection", run(func() error { o.Finish(); return nil }))

	s.limits.farewell = patience
	o = s.output("c")
	r = s.reader("c")
	defer r.Close()
	finished := run(func() error { o.Finish(); return nil })
	waits(t, "Finish", finished)
	o.Close()
	result(t, "Finish after Close", finished)
}

// What is written while no client is there, or has not been sent yet, is for
// the next.
func TestReconnect(t *testing.T) {
	s := serve(t, nil)
	o := s.output("a")
	r := s.reader("a")
	result(t, "Write", write(o, []byte("first")))
	readString(t, r, "first")
	r.Close()
	eventually(t, "client has left", func() bool { return !o.Connected() })
	data := randomBytes(1 << 20)
	written := write(o, data)
	waits(t, "Write() without a client", written)
	got := readAll(s.reader("a"))
	if err := result(t, "Write", written); err != nil {
		t.Fatalf("Write() = %v; want nil", err)
	}
	o.Finish()
	sameBytes(t, "second client", result(t, "second client", got), data)
}

// A client that dies in the middle leaves a whole rest to the next: no byte
// comes out of order, and at most what it had allowed is lost.
func TestClientDies(t *testing.T) {
	s := serve(t, nil)
	o := s.output("a")
	data := randomBytes(4 << 20)
	conn := s.open("a").(closer)
	got := make(chan int, 1)
	go func() {
		r := streaming.ReadByteStream(s.context(), conn)
		n, _ := r.Read(make([]byte, 100))
		conn.conn.Close()
		got <- n
	}()
	written := write(o, data)
	result(t, "first client", got)
	rest := readAll(s.reader("a"))
	if err := result(t, "Write", written); err != nil {
		t.Fatalf("Write() = %v; want nil", err)
	}
	o.Finish()
	tail := result(t, "second client", rest)
	if lost := len(data) - len(tail); lost < 0 || lost > 128<<10 {
		t.Fatalf("second client got %d bytes of %d; want all but 128 KiB", len(tail), len(data))
	}
	sameBytes(t, "second client", tail, data[len(data)-len(tail):])
}

func TestTakeover(t *testing.T) {
	s := serve(t, nil)
	for _, claimed := range []bool{false, true} {
		var o *Output
		if claimed {
			o = s.output("a")
		}
		old := s.open("a")
		r := s.reader("a")
		_, err := old.Recv()
		if !errdefs.IsAborted(err) {
			t.Errorf("first client read %v; want an aborted stream", err)
		}
		old.Close()
		if !claimed {
			o = s.output("a")
		}
		result(t, "Write", write(o, []byte("for the second")))
		readString(t, r, "for the second")
		r.Close()
		o.Close()
	}
}

// A client that does not read holds up its own stream alone.
func TestClientStopsReading(t *testing.T) {
	s := serve(t, nil)
	deaf := s.output("deaf")
	r := s.reader("deaf")
	written := write(deaf, randomBytes(1<<20))
	waits(t, "Write() to a client that does not read", written)
	before := deaf.Moved()

	other := s.output("other")
	got := readAll(s.reader("other"))
	result(t, "Write to another", write(other, []byte("alive")))
	other.Finish()
	if got := string(result(t, "client", got)); got != "alive" {
		t.Errorf("other client read %q; want alive", got)
	}

	if after := deaf.Moved(); after != before {
		t.Errorf("Moved() of a blocked stream went from %d to %d", before, after)
	}
	deaf.Close()
	if err := result(t, "Write", written); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Write() after Close = %v; want os.ErrClosed", err)
	}
	// The client gets what was sent, and the end.
	if got := len(result(t, "client", readAll(r))); got == 0 || got > 128<<10 {
		t.Errorf("client of a closed stream read %d bytes; want some, at most 128 KiB", got)
	}
}

// ttrpc gives up a stream that has 64 messages waiting.
func TestManySmallWrites(t *testing.T) {
	s := serve(t, nil)
	o := s.output("a")
	r := s.reader("a")
	const n = 70
	start := time.Now()
	written := run(func() error {
		for range n {
			if _, err := o.Write([]byte("x")); err != nil {
				return err
			}
		}
		return nil
	})
	result(t, "Write", written)
	if took, least := time.Since(start), (n-freeMessages-1)*defaultLimits.spacing; took < least {
		t.Errorf("%d small messages took %v; want at least %v", n, took, least)
	}
	got := readAll(r)
	o.Finish()
	if got := result(t, "client", got); len(got) != n {
		t.Errorf("client read %q; want %d bytes", got, n)
	}
}

func TestClose(t *testing.T) {
	s := serve(t, nil)
	for range 3 { // the id can be used again
		o := s.output("a")
		if _, err := s.Output("a"); !errdefs.IsAlreadyExists(err) {
			t.Errorf("second Output() = %v; want ErrAlreadyExists", err)
		}
		if _, err := s.Input("a"); !errdefs.IsAlreadyExists(err) {
			t.Errorf("Input() of an output's stream = %v; want ErrAlreadyExists", err)
		}
		r := s.reader("a")
		o.Close()
		o.Close()
		if got := result(t, "client", readAll(r)); len(got) != 0 {
			t.Errorf("client of a closed stream read %q; want its end", got)
		}
		if _, err := o.Write([]byte("x")); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Write() after Close = %v; want os.ErrClosed", err)
		}
		o.Finish()
	}
}

// Finish depends on connection: what it finds must end with the connection and
// not with the call.
func TestConnection(t *testing.T) {
	s := serve(t, nil)
	st := s.open("a").(closer)
	o := s.output("a")
	eventually(t, "client", o.Connected)
	o.stream.mu.Lock()
	c := o.stream.client
	o.stream.mu.Unlock()
	if c.closed == nil {
		t.Fatal("connection() = nil for a ttrpc request: have the types of ttrpc or package context changed?")
	}
	o.Finish()
	eventually(t, "end of the call", func() bool { return c.ctx.Err() != nil })
	waits(t, "end of the connection", c.closed)
	st.conn.Close()
	result(t, "end of the connection", c.closed)
	if got := connection(context.Background()); got != nil {
		t.Errorf("connection(Background) = %v; want nil", got)
	}
}
