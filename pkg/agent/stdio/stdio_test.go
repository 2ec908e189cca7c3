package stdio

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/fifo"

	"github.com/vmrt/vmrt/api"
)

func TestLargeTransferBothWays(t *testing.T) {
	const size = 20 << 20
	bothKinds(t, func(t *testing.T, terminal bool) {
		h := newHost(t, testLimits())
		u := URLs{Stdin: api.StreamURL("in"), Stdout: api.StreamURL("out")}
		in, out := h.dial("in"), h.dial("out")
		p := h.open(u, terminal)
		s := launch(t, p)
		s.started(p)
		data := noise(size)
		go func() {
			in.Write(data)
			in.CloseWrite()
		}()
		go func() { // the process copies stdin to stdout
			io.Copy(s.stdout, s.stdin)
			s.closeOutputs()
		}()
		sum := sha256.New()
		n, err := io.Copy(sum, out)
		if n != size || err != nil || [32]byte(sum.Sum(nil)) != sha256.Sum256(data) {
			t.Errorf("stdout = %d bytes, %v; want the %d sent", n, err, size)
		}
		out.Close()
		p.Deleted()
		waitFor(t, p)
		s.closeAll()
		checkEmpty(t, h.dir)
	})
}

func TestOutputsApart(t *testing.T) {
	h := newHost(t, testLimits())
	out, errs := h.dial("out"), h.dial("err")
	p := h.open(URLs{Stdout: api.StreamURL("out"), Stderr: api.StreamURL("err")}, false)
	s := launch(t, p)
	s.started(p)
	io.WriteString(s.stdout, "output")
	io.WriteString(s.stderr, "error")
	s.closeOutputs()
	p.Drain(t.Context())
	for want, c := range map[string]*net.UnixConn{"output": out, "error": errs} {
		if b, err := io.ReadAll(c); string(b) != want || err != nil {
			t.Errorf("stream = %q, %v; want %q", b, err, want)
		}
		c.Close()
	}
	p.Deleted()
	waitFor(t, p)
}

// The end of input must follow the last byte, also when the process reads
// late, and also when there is no byte at all.
func TestStdinHalfClose(t *testing.T) {
	for _, size := range []int{0, 1, 3 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			bothKinds(t, func(t *testing.T, terminal bool) {
				h := newHost(t, testLimits())
				in := h.dial("in")
				p := h.open(URLs{Stdin: api.StreamURL("in")}, terminal)
				data := noise(size)
				go func() {
					in.Write(data)
					in.CloseWrite()
				}()
				s := launch(t, p)
				s.started(p)
				got, err := io.ReadAll(s.stdin)
				if sha256.Sum256(got) != sha256.Sum256(data) || err != nil {
					t.Errorf("stdin = %d bytes, %v; want the %d sent", len(got), err, size)
				}
				// The agent closes the connection when the process has it all.
				if _, err := in.Read(make([]byte, 1)); err != io.EOF {
					t.Errorf("read from the stdin stream = %v; want EOF", err)
				}
				p.Deleted()
				waitFor(t, p)
				s.closeAll()
			})
		})
	}
}

func TestStdinWithoutHalfCloseStaysOpen(t *testing.T) {
	bothKinds(t, func(t *testing.T, terminal bool) {
		h := newHost(t, testLimits())
		in := h.dial("in")
		p := h.open(URLs{Stdin: api.StreamURL("in")}, terminal)
		s := launch(t, p)
		p.Started(func() { t.Error("stdin was closed without a half-close") })
		for _, word := range []string{"one", "two"} {
			io.WriteString(in, word)
			got := make([]byte, len(word))
			if _, err := io.ReadFull(s.stdin, got); string(got) != word || err != nil {
				t.Fatalf("stdin = %q, %v; want %q", got, err, word)
			}
		}
		p.Deleted()
		waitFor(t, p)
		s.closeAll()
	})
}

// A process that has closed its stdin makes the host's writes fail.
func TestStdinClosedByProcess(t *testing.T) {
	bothKinds(t, func(t *testing.T, terminal bool) {
		h := newHost(t, testLimits())
		in := h.dial("in")
		p := h.open(URLs{Stdin: api.StreamURL("in")}, terminal)
		s := launch(t, p)
		p.Started(func() { t.Error("stdin was closed without a half-close") })
		io.WriteString(in, "x")
		if _, err := s.stdin.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		s.stdin.Close()
		var err error
		for err == nil {
			_, err = in.Write(make([]byte, 1024))
		}
		if !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("write to a closed stdin = %v; want EPIPE", err)
		}
		p.Deleted()
		waitFor(t, p)
		s.closeAll()
	})
}

// The host reads nothing: Deleted must end the stream, and nobody must stay
// blocked.
func TestHostDoesNotRead(t *testing.T) {
	bothKinds(t, func(t *testing.T, terminal bool) {
		h := newHost(t, testLimits())
		h.dial("out")
		p := h.open(URLs{Stdout: api.StreamURL("out")}, terminal)
		s := launch(t, p)
		s.started(p)
		written := make(chan struct{})
		go func() { // far more than pipe and sockets hold
			s.stdout.Write(noise(8 << 20))
			s.closeOutputs()
			close(written)
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		select {
		case <-written:
			t.Fatal("8 MiB fitted into a stream that nobody reads")
		case <-ctx.Done():
		}
		p.Drain(ctx) // gives up
		p.Deleted()
		waitFor(t, p)
		select {
		case <-written:
		case <-time.After(patience):
			t.Error("the writer is still blocked after Deleted")
		}
	})
}

// After Deleted a host that reads slowly still gets everything.
func TestDeletedDeliversTheRest(t *testing.T) {
	bothKinds(t, func(t *testing.T, terminal bool) {
		h := newHost(t, testLimits())
		out := h.dial("out")
		p := h.open(URLs{Stdout: api.StreamURL("out")}, terminal)
		s := launch(t, p)
		s.started(p)
		data := noise(200 << 10) // fits into the pipe
		s.stdout.Write(data)
		s.closeOutputs()
		p.Deleted()
		var got []byte
		for b := make([]byte, 16<<10); ; time.Sleep(10 * time.Millisecond) {
			n, err := out.Read(b)
			got = append(got, b[:n]...)
			if err != nil {
				break
			}
		}
		if sha256.Sum256(got) != sha256.Sum256(data) {
			t.Errorf("stdout after Deleted = %d bytes; want the %d written", len(got), len(data))
		}
		out.Close()
		waitFor(t, p)
	})
}

// Drain must have delivered everything to a host that reads.
func TestDrain(t *testing.T) {
	h := newHost(t, testLimits())
	out := h.dial("out")
	p := h.open(URLs{Stdout: api.StreamURL("out")}, false)
	s := launch(t, p)
	s.started(p)
	const size = 8 << 20
	read := make(chan int, 1)
	go func() {
		b, _ := io.ReadAll(out)
		read <- len(b)
	}()
	go func() {
		s.stdout.Write(noise(size))
		s.closeOutputs()
	}()
	p.Drain(t.Context())
	p.Deleted()
	if n := <-read; n != size {
		t.Errorf("stdout = %d bytes; want %d", n, size)
	}
	out.Close()
	waitFor(t, p)
}

// A child that keeps the output and goes on writing does not outlive Deleted,
// and what it has written until then arrives.
func TestDeletedEndsBackgroundChild(t *testing.T) {
	h := newHost(t, testLimits())
	out := h.dial("out")
	p := h.open(URLs{Stdout: api.StreamURL("out")}, false)
	s := launch(t, p)
	s.started(p)
	data := noise(100 << 10)
	s.stdout.Write(data)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	p.Drain(ctx)
	p.Deleted()
	got, err := io.ReadAll(out)
	if sha256.Sum256(got) != sha256.Sum256(data) || err != nil {
		t.Errorf("stdout = %d bytes, %v; want the %d written before Deleted", len(got), err, len(data))
	}
	out.Close()
	waitFor(t, p)
	if _, err := s.stdout.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("write after Deleted = %v; want EPIPE", err)
	}
	s.closeAll()
}

// A host that gives a stream up must not block the process.
func TestHostAbandonsOutput(t *testing.T) {
	bothKinds(t, func(t *testing.T, terminal bool) {
		h := newHost(t, testLimits())
		out := h.dial("out")
		p := h.open(URLs{Stdout: api.StreamURL("out")}, terminal)
		s := launch(t, p)
		s.started(p)
		out.Close()
		written := make(chan struct{})
		go func() {
			s.stdout.Write(noise(4 << 20))
			s.closeOutputs()
			close(written)
		}()
		select {
		case <-written:
		case <-time.After(patience):
			t.Error("a process is blocked by a stream that the host has closed")
		}
		waitFor(t, p)
	})
}

// Output stays open as long as somebody holds it, whatever exits.
func TestOutputOfBackgroundChild(t *testing.T) {
	bothKinds(t, func(t *testing.T, terminal bool) {
		h := newHost(t, testLimits())
		out := h.dial("out")
		p := h.open(URLs{Stdout: api.StreamURL("out")}, terminal)
		s := launch(t, p)
		s.started(p)
		for range 3 {
			io.WriteString(s.stdout, "tick")
			b := make([]byte, 4)
			if _, err := io.ReadFull(out, b); string(b) != "tick" || err != nil {
				t.Fatalf("stdout = %q, %v; want tick", b, err)
			}
		}
		s.closeOutputs()
		if b, err := io.ReadAll(out); len(b) > 0 || err != nil {
			t.Errorf("stdout = %q, %v; want its end", b, err)
		}
		out.Close()
		waitFor(t, p)
	})
}

func TestAbort(t *testing.T) {
	bothKinds(t, func(t *testing.T, terminal bool) {
		h := newHost(t, testLimits())
		u := URLs{Stdin: api.StreamURL("in"), Stdout: api.StreamURL("out")}
		conns := []*net.UnixConn{h.dial("in"), h.dial("out")}
		p := h.open(u, terminal)
		p.Abort()
		p.Abort()
		p.Deleted()
		waitFor(t, p)
		for i, c := range conns {
			if _, err := c.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("stream %d: read after Abort = %v; want EOF", i, err)
			}
		}
		checkEmpty(t, h.dir)
	})
}

// The command, or the task service, may have opened its ends before it failed.
func TestAbortAfterLaunch(t *testing.T) {
	bothKinds(t, func(t *testing.T, terminal bool) {
		h := newHost(t, testLimits())
		h.dial("in")
		h.dial("out")
		p := h.open(URLs{Stdin: api.StreamURL("in"), Stdout: api.StreamURL("out")}, terminal)
		s := launch(t, p)
		p.Abort()
		s.closeAll() // returns only if the opens were not left waiting
		waitFor(t, p)
		checkEmpty(t, h.dir)
	})
}

func TestAbortAfterStart(t *testing.T) {
	bothKinds(t, func(t *testing.T, terminal bool) {
		h := newHost(t, testLimits())
		out := h.dial("out")
		p := h.open(URLs{Stdout: api.StreamURL("out")}, terminal)
		s := launch(t, p)
		s.started(p)
		p.Abort()
		if _, err := out.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("read after Abort = %v; want EOF", err)
		}
		s.closeAll()
		waitFor(t, p)
	})
}

func TestDeletedWithoutStart(t *testing.T) {
	bothKinds(t, func(t *testing.T, terminal bool) {
		h := newHost(t, testLimits())
		in := h.dial("in")
		h.dial("out")
		p := h.open(URLs{Stdin: api.StreamURL("in"), Stdout: api.StreamURL("out")}, terminal)
		io.WriteString(in, "never read")
		p.Drain(t.Context())
		p.Deleted()
		waitFor(t, p)
		checkEmpty(t, h.dir)
	})
}

// Deleted may come while the input still waits for the service's reader.
func TestDeletedWhileOpening(t *testing.T) {
	h := newHost(t, testLimits())
	h.dial("in")
	p := h.open(URLs{Stdin: api.StreamURL("in")}, true)
	p.Started(func() { t.Error("stdin was closed") })
	p.Deleted()
	waitFor(t, p)
	checkEmpty(t, h.dir)
}

func TestOpenPaths(t *testing.T) {
	for _, tt := range []struct {
		name     string
		urls     URLs
		terminal bool
		want     Paths  // "*" is a FIFO
		files    string // "ioe": those that the process is given
	}{
		{"nothing", URLs{}, false, Paths{}, ""},
		{"stdout only", URLs{Stdout: "a"}, false, Paths{}, "o"},
		{"stderr only", URLs{Stderr: "a"}, false, Paths{}, "e"},
		{"all", URLs{"a", "b", "c"}, false, Paths{}, "ioe"},
		{"terminal", URLs{Stdin: "a", Stdout: "b"}, true, Paths{Stdin: "*", Stdout: "*"}, ""},
		{"terminal without streams", URLs{}, true, Paths{Stdout: discardPath}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t, testLimits())
			u := tt.urls
			for _, f := range []*string{&u.Stdin, &u.Stdout, &u.Stderr} {
				if *f != "" {
					h.dial(*f)
					*f = api.StreamURL(*f)
				}
			}
			p := h.open(u, tt.terminal)
			got := p.Paths()
			for _, f := range []*string{&got.Stdin, &got.Stdout, &got.Stderr} {
				if ok, _ := fifo.IsFifo(*f); ok {
					*f = "*"
				}
			}
			files := ""
			for i, f := range []*os.File{p.Files().Stdin, p.Files().Stdout, p.Files().Stderr} {
				if f != nil {
					files += "ioe"[i : i+1]
				}
			}
			if got != tt.want || files != tt.files {
				t.Errorf("Paths(), Files() = %+v, %q; want %+v, %q", got, files, tt.want, tt.files)
			}
			p.Abort()
			waitFor(t, p)
			checkEmpty(t, h.dir)
		})
	}
}

func TestOpenErrors(t *testing.T) {
	for _, tt := range []struct {
		name     string
		urls     URLs
		terminal bool
		want     error
	}{
		{"unknown stream", URLs{Stdout: api.StreamURL("nobody")}, false, errdefs.ErrNotFound},
		{"path", URLs{Stdout: "/run/fifo"}, false, errdefs.ErrInvalidArgument},
		{"file", URLs{Stdout: "file:///tmp/log"}, false, errdefs.ErrInvalidArgument},
		{"binary", URLs{Stdin: "binary:///bin/sh"}, false, errdefs.ErrInvalidArgument},
		{"stderr of a terminal", URLs{Stderr: api.StreamURL("known")}, true, errdefs.ErrInvalidArgument},
		{"second unknown", URLs{api.StreamURL("known"), api.StreamURL("nobody"), ""}, false, errdefs.ErrNotFound},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t, testLimits())
			h.dial("known")
			_, err := h.registry.Open(h.dir, tt.urls, tt.terminal)
			if !errors.Is(err, tt.want) {
				t.Errorf("Open(%+v) = %v; want %v", tt.urls, err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), "failed") {
				t.Errorf("Open(%+v) = %v; want an error of operation and object", tt.urls, err)
			}
			checkEmpty(t, h.dir)
		})
	}
}
