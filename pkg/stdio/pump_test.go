package stdio

import (
	"bytes"
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// A stream holds a whole buffer only while something flows.
func TestIdleStreamHoldsNoBuffer(t *testing.T) {
	for _, kind := range []string{"connection", "FIFO"} {
		t.Run(kind, func(t *testing.T) {
			checkLeaks(t)
			var src source
			var dst io.WriteCloser
			if kind == "connection" {
				host, guest := connPair(t)
				src, dst = host, guest
			} else {
				path := makeFIFO(t, "fifo")
				src, dst = openReader(t, path), openWriter(t, path)
			}
			watched := &watchedSource{source: src, waits: make(chan int, 16)}
			got := make(chan string, 16)
			ended := start(func() {
				if err := copyStream(writerFunc(func(p []byte) (int, error) {
					got <- string(p)
					return len(p), nil
				}), watched, 20*time.Millisecond); err != nil {
					t.Errorf("copyStream() = %v", err)
				}
			})
			for range 3 {
				if n := await(t, "idle read", watched.waits); n != idleSize {
					t.Errorf("idle stream reads into %d bytes; want %d", n, idleSize)
				}
				dst.Write([]byte("x"))
				if s := await(t, "text", got); s != "x" {
					t.Errorf("copied %q; want %q", s, "x")
				}
				// Then a whole buffer, until nothing came for a while.
				for n := range watched.waits {
					if n == bufferSize {
						break
					}
				}
				for len(watched.waits) > 0 {
					<-watched.waits
				}
				dst.Write([]byte("y"))
				if s := await(t, "text", got); s != "y" {
					t.Errorf("copied %q; want %q", s, "y")
				}
				watched.awaitIdle(t)
			}
			dst.Close()
			await(t, "end of copy", ended)
		})
	}
}

// watchedSource reports the size of each read before it is done.
type watchedSource struct {
	source
	waits chan int
}

func (w *watchedSource) Read(p []byte) (int, error) {
	w.waits <- len(p)
	return w.source.Read(p)
}

// awaitIdle returns when the next wait is one of an idle stream, which it
// leaves in the channel.
func (w *watchedSource) awaitIdle(t *testing.T) {
	for {
		if n := await(t, "read", w.waits); n == idleSize {
			w.waits <- n
			return
		}
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// scripted is a source whose reads are given; it ends with io.EOF.
type scripted struct {
	reads []scriptedRead
	// noDeadlines makes it like a regular file.
	noDeadlines bool
}

type scriptedRead struct {
	text string
	err  error
}

func (s *scripted) Read(p []byte) (int, error) {
	if len(s.reads) == 0 {
		return 0, io.EOF
	}
	r := s.reads[0]
	s.reads = s.reads[1:]
	return copy(p, r.text), r.err
}

func (s *scripted) SetReadDeadline(time.Time) error {
	if s.noDeadlines {
		return os.ErrNoDeadline
	}
	return nil
}

func TestCopyStream(t *testing.T) {
	broken := errors.New("broken")
	for _, tc := range []struct {
		name string
		src  scripted
		want string
		err  error
	}{
		{"empty", scripted{}, "", nil},
		{"text", scripted{reads: []scriptedRead{{"a", nil}, {"b", nil}}}, "ab", nil},
		{"text with the end", scripted{reads: []scriptedRead{{"a", io.EOF}}}, "a", nil},
		{"later text with the end", scripted{reads: []scriptedRead{{"a", nil}, {"b", io.EOF}}}, "ab", nil},
		{"text with an error", scripted{reads: []scriptedRead{{"a", broken}}}, "a", broken},
		{"later text with an error", scripted{reads: []scriptedRead{{"a", nil}, {"b", broken}, {"c", nil}}}, "ab", broken},
		{"text with a timeout", scripted{reads: []scriptedRead{{"a", nil}, {"b", os.ErrDeadlineExceeded}, {"c", nil}}}, "abc", nil},
		{"nothing read", scripted{reads: []scriptedRead{{"", nil}, {"", nil}, {"a", nil}}}, "a", nil},
		{"no deadlines", scripted{reads: []scriptedRead{{"a", nil}, {"b", nil}}, noDeadlines: true}, "ab", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got bytes.Buffer
			err := copyStream(&got, &tc.src, time.Second)
			if got.String() != tc.want || !errors.Is(err, tc.err) || (err != nil) != (tc.err != nil) {
				t.Errorf("copyStream() = %v, copied %q; want %v, %q", err, got.String(), tc.err, tc.want)
			}
		})
	}
}

func TestDelivery(t *testing.T) {
	full := errors.New("full")
	results := []error{nil, full, nil, full, os.ErrClosed}
	var refused []error
	d := &delivery{
		dst: writerFunc(func(p []byte) (int, error) {
			err := results[0]
			results = results[1:]
			if err != nil {
				return 1, err
			}
			return len(p), nil
		}),
		refused: func(err error) { refused = append(refused, err) },
	}
	var got []error
	for range 5 {
		_, err := d.Write([]byte("text"))
		got = append(got, err)
	}
	if diff := cmp.Diff([]error{nil, nil, nil, nil, os.ErrClosed}, got, cmp.Comparer(errors.Is)); diff != "" {
		t.Errorf("Write() (-want +got):\n%s", diff)
	}
	if len(refused) != 1 || refused[0] != full || d.dropped != 6 {
		t.Errorf("refused %v, dropped %d; want one error and 6 bytes", refused, d.dropped)
	}
}

func BenchmarkOutput(b *testing.B) {
	for _, size := range []struct {
		name  string
		bytes int
	}{{"4K", 4 << 10}, {"64K", 64 << 10}} {
		b.Run(size.name, func(b *testing.B) {
			ctx, _ := testContext(b)
			s := openStreams(b, ctx, true)
			s.attach(b, nil)
			chunk := make([]byte, size.bytes)
			drained := start(func() { io.CopyBuffer(writerOnly{io.Discard}, readerOnly{s.stdout}, make([]byte, 64<<10)) })
			b.SetBytes(int64(size.bytes))
			for b.Loop() {
				s.guestOut.Write(chunk)
			}
			s.guestOut.Close()
			<-drained
		})
	}
}

func BenchmarkInput(b *testing.B) {
	for _, size := range []struct {
		name  string
		bytes int
	}{{"4K", 4 << 10}, {"64K", 64 << 10}} {
		b.Run(size.name, func(b *testing.B) {
			ctx, _ := testContext(b)
			s := openStreams(b, ctx, true)
			s.attach(b, nil)
			chunk := make([]byte, size.bytes)
			drained := start(func() { io.CopyBuffer(writerOnly{io.Discard}, readerOnly{s.guestIn}, make([]byte, 64<<10)) })
			b.SetBytes(int64(size.bytes))
			for b.Loop() {
				s.stdin.Write(chunk)
			}
			s.stdin.Close()
			s.io.CloseStdin()
			<-drained
		})
	}
}

// BenchmarkRaw is what the machine can do: a socket pair alone.
func BenchmarkRaw(b *testing.B) {
	host, guest := connPair(b)
	chunk := make([]byte, 64<<10)
	drained := start(func() { io.CopyBuffer(writerOnly{io.Discard}, readerOnly{host}, make([]byte, 64<<10)) })
	b.SetBytes(int64(len(chunk)))
	for b.Loop() {
		guest.Write(chunk)
	}
	guest.Close()
	<-drained
}

// BenchmarkRoundTrip is one byte there and back.
func BenchmarkRoundTrip(b *testing.B) {
	ctx, _ := testContext(b)
	s := openStreams(b, ctx, true)
	s.attach(b, nil)
	go io.Copy(s.guestOut, s.guestIn)
	one := make([]byte, 1)
	for b.Loop() {
		s.stdin.Write(one)
		s.stdout.Read(one)
	}
}

type readerOnly struct{ io.Reader }

type writerOnly struct{ io.Writer }
