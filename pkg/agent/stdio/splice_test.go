package stdio

import (
	"bytes"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// connPair returns the agent's and the host's end of a stream.
func connPair(t *testing.T) (agent, host *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "stream")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(20 * time.Second))
		conns[i] = c.(*net.UnixConn)
	}
	return conns[0], conns[1]
}

// TestWaysToMove moves the same bytes by splice and by the copy that kernels
// get which cannot: all of them arrive, through a pipe and a reader that are
// slower than the writer.
func TestWaysToMove(t *testing.T) {
	data := noise(3 << 20)
	for _, tt := range []struct {
		name string
		in   func(*input, *os.File) error
		out  func(*output, source) error
	}{
		{"splice", (*input).feed, (*output).splice},
		{"copy", (*input).copy, (*output).copy},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Run("in", func(t *testing.T) {
				agent, host := connPair(t)
				r, w, err := os.Pipe()
				if err != nil {
					t.Fatal(err)
				}
				defer r.Close()
				go func() {
					host.Write(data)
					host.CloseWrite()
				}()
				fed := make(chan error, 1)
				go func() {
					fed <- tt.in(&input{conn: agent}, w)
					w.Close()
				}()
				check(t, r, data)
				if err := <-fed; err != nil {
					t.Errorf("feed: %v; want nil at the host's half-close", err)
				}
			})
			t.Run("in without a reader", func(t *testing.T) {
				agent, host := connPair(t)
				r, w, err := os.Pipe()
				if err != nil {
					t.Fatal(err)
				}
				defer w.Close()
				r.Close()
				host.Write(data[:1])
				if err := tt.in(&input{conn: agent}, w); err == nil {
					t.Error("feed of a process that has closed its stdin = nil; want an error")
				}
			})
			t.Run("out", func(t *testing.T) {
				agent, host := connPair(t)
				r, w, err := os.Pipe()
				if err != nil {
					t.Fatal(err)
				}
				defer r.Close()
				go func() {
					w.Write(data)
					w.Close()
				}()
				src, err := newSource(r)
				if err != nil {
					t.Fatal(err)
				}
				delivered := make(chan error, 1)
				go func() {
					delivered <- tt.out(&output{conn: agent, pipe: r}, src)
					agent.CloseWrite()
				}()
				check(t, host, data)
				if err := <-delivered; err != nil {
					t.Errorf("deliver: %v; want nil at the pipe's end", err)
				}
			})
		})
	}
}

// check reads slowly at first, so that whoever writes has to wait.
func check(t *testing.T, r io.Reader, want []byte) {
	t.Helper()
	time.Sleep(20 * time.Millisecond)
	got, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes arrived, %v; want the %d that were sent", len(got), err, len(want))
	}
}

// A pipe may get room between a splice that found none and the look at why: the
// rest of the bytes is then there already, and nothing will tell of it again.
func TestSpliceInKeepsGoing(t *testing.T) {
	const size, rounds = 64 << 10, 3000
	agent, host := connPair(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	fed := make(chan error, 1)
	go func() {
		_, err := spliceFrom(agent, w)
		w.Close()
		fed <- err
	}()
	r.SetReadDeadline(time.Now().Add(20 * time.Second))
	message, buf := noise(2*size), make([]byte, 2*size)
	for i := range rounds {
		// More than the pipe holds, and no more until all has arrived.
		n := size + 4096*(i%16)
		if _, err := host.Write(message[:n]); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(r, buf[:n]); err != nil {
			t.Fatalf("round %d: %v; want %d bytes", i, err, n)
		}
	}
	host.CloseWrite()
	if err := <-fed; err != nil {
		t.Errorf("spliceFrom = %v; want nil", err)
	}
}
