package stdio

import (
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// faulty is a connection that breaks after some bytes.
type faulty struct {
	Conn
	left int
}

var errBroken = errors.New("connection broken")

func (c *faulty) Read(p []byte) (int, error) {
	if c.left == 0 {
		return 0, errBroken
	}
	n, err := c.Conn.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}

func TestGuestBreaks(t *testing.T) {
	checkLeaks(t)
	ctx, logged := testContext(t)
	s := openStreams(t, ctx, false)
	s.attach(t, func(c Conn) Conn { return &faulty{Conn: c, left: 100_000} })
	data := randomBytes(200_000)
	go s.guestOut.Write(data)
	// What arrived is delivered, then the client reads the end.
	sameBytes(t, "stdout", await(t, "stdout", readAll(s.stdout)), data[:100_000])
	s.guestErr.Close()
	if err := s.io.Drain(ctx); err != nil {
		t.Errorf("Drain() = %v", err)
	}
	if got := logged.String(); !strings.Contains(got, "stdout ended early") || !strings.Contains(got, errBroken.Error()) {
		t.Errorf("log = %q; want the broken connection in it", got)
	}
	// Without a reader in the guest, the client of stdin gets EPIPE.
	s.guestIn.Close()
	s.stdin.SetWriteDeadline(time.Now().Add(patience))
	for {
		if _, err := s.stdin.Write(data); err != nil {
			if !errors.Is(err, unix.EPIPE) {
				t.Errorf("client's write to stdin = %v; want EPIPE", err)
			}
			break
		}
	}
}

func TestCloseHalfBuilt(t *testing.T) {
	for _, tc := range []struct {
		name string
		use  func(t *testing.T, s *streams)
	}{
		{"opened", func(*testing.T, *streams) {}},
		{"stdin closed", func(_ *testing.T, s *streams) { s.io.CloseStdin() }},
		{"attached", func(t *testing.T, s *streams) { s.attach(t, nil) }},
		{"attached nothing", func(t *testing.T, s *streams) {
			s.io.Attach(nil, nil, nil)
			// Streams without a connection end at once.
			readEnd(t, "stdout", s.stdout)
			readEnd(t, "stderr", s.stderr)
			if err := s.io.Drain(t.Context()); err != nil {
				t.Errorf("Drain() = %v", err)
			}
		}},
		{"attached one", func(t *testing.T, s *streams) {
			host, guest := connPair(t)
			s.io.Attach(nil, host, nil)
			guest.Write([]byte("text"))
			readString(t, "stdout", s.stdout, "text")
		}},
		{"attached twice", func(t *testing.T, s *streams) {
			s.attach(t, nil)
			host, guest := connPair(t)
			s.io.Attach(host, nil, nil)
			readEnd(t, "second connection", guest)
			s.guestOut.Write([]byte("text"))
			readString(t, "stdout", s.stdout, "text")
		}},
		{"busy", func(t *testing.T, s *streams) {
			s.attach(t, nil)
			for _, c := range []net.Conn{s.guestOut, s.guestErr} {
				go func() {
					for {
						if _, err := c.Write(make([]byte, 10_000)); err != nil {
							return
						}
					}
				}()
			}
			go io.Copy(s.stdin, neverEnding{})
			io.CopyN(io.Discard, s.stdout, 1<<20)
			io.CopyN(io.Discard, s.guestIn, 1<<20)
		}},
		{"guest gone", func(t *testing.T, s *streams) {
			s.attach(t, nil)
			for _, c := range []net.Conn{s.guestIn, s.guestOut, s.guestErr} {
				c.Close()
			}
		}},
		{"closed", func(_ *testing.T, s *streams) { s.io.Close() }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			checkLeaks(t)
			ctx, _ := testContext(t)
			s := openStreams(t, ctx, false)
			tc.use(t, s)
			var wg sync.WaitGroup
			for range 3 {
				wg.Go(func() {
					if err := s.io.Close(); err != nil {
						t.Errorf("Close() = %v", err)
					}
				})
			}
			wg.Wait()
			// Everything still may be called.
			if err := s.io.CloseStdin(); err != nil {
				t.Errorf("CloseStdin() after Close = %v", err)
			}
			if err := s.io.Drain(ctx); err != nil {
				t.Errorf("Drain() after Close = %v", err)
			}
			host, guest := connPair(t)
			s.io.Attach(nil, host, nil)
			readEnd(t, "connection attached after Close", guest)
			if _, err := s.stdin.Write([]byte("x")); !errors.Is(err, unix.EPIPE) {
				t.Errorf("client's write to stdin after Close = %v; want EPIPE", err)
			}
			io.Copy(io.Discard, s.stderr) // ends
		})
	}
}

type neverEnding struct{}

func (neverEnding) Read(p []byte) (int, error) { return len(p), nil }

func TestCloseUnwantedConnection(t *testing.T) {
	checkLeaks(t)
	s, err := Open(t.Context(), Config{ID: "web"})
	if err != nil {
		t.Fatalf("Open() = %v", err)
	}
	host, guest := connPair(t)
	s.Attach(nil, host, nil)
	readEnd(t, "connection of a process without streams", guest)
	if err := errors.Join(s.Drain(t.Context()), s.CloseStdin(), s.Close()); err != nil {
		t.Errorf("Drain, CloseStdin, Close = %v", err)
	}
}
