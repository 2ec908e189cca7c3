package stdio

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmrt/vmrt/api"
)

// dropped waits until the registry has closed c.
func dropped(t *testing.T, c io.Reader, what string) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || isTimeout(err) {
		t.Errorf("%s: read = %d, %v; want a closed connection", what, n, err)
	}
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

func TestUnclaimedIsDropped(t *testing.T) {
	l := testLimits()
	l.Claim = 20 * time.Millisecond
	h := newHost(t, l)
	dropped(t, h.dial("a"), "unclaimed stream")
	if _, err := h.registry.Take("a"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("Take(a) = %v; want %v", err, errdefs.ErrNotFound)
	}
	h.dial("a") // the name is free again
}

func TestSilentConnectionIsDropped(t *testing.T) {
	l := testLimits()
	l.Header, l.Unclaimed = 20*time.Millisecond, 1
	h := newHost(t, l)
	dropped(t, h.connect(), "silent connection")
	h.dial("a") // its place is free again
}

func TestUnclaimedIsBounded(t *testing.T) {
	l := testLimits()
	l.Unclaimed = 2
	h := newHost(t, l)
	a := h.dial("a")
	h.dial("b")
	dropped(t, h.connect(), "third of two")
	c, err := h.registry.Take("a")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	h.dial("c")
	io.WriteString(a, "x")
	if b, err := io.ReadAll(io.LimitReader(c, 1)); string(b) != "x" || err != nil {
		t.Errorf("read from the stream taken = %q, %v; want x", b, err)
	}
}

func TestNameIsUnique(t *testing.T) {
	h := newHost(t, testLimits())
	first := h.dial("a")
	second := h.connect()
	if err := api.WriteStreamHeader(second, "a"); err != nil {
		t.Fatal(err)
	}
	dropped(t, second, "second stream of a name")
	c, err := h.registry.Take("a")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "x")
	if _, err := first.Read(make([]byte, 1)); err != nil {
		t.Errorf("read from the first stream = %v; want a byte", err)
	}
}

func TestOneTakerWins(t *testing.T) {
	h := newHost(t, testLimits())
	h.dial("a")
	var wg sync.WaitGroup
	won := make(chan Conn, 8)
	for range 8 {
		wg.Go(func() {
			if c, err := h.registry.Take("a"); err == nil {
				won <- c
			}
		})
	}
	wg.Wait()
	if len(won) != 1 {
		t.Errorf("takers of one stream = %d; want 1", len(won))
	}
	for len(won) > 0 {
		(<-won).Close()
	}
}

func TestCloseDropsWaiting(t *testing.T) {
	h := newHost(t, testLimits())
	a := h.dial("a")
	h.registry.Close()
	dropped(t, a, "stream of a closed registry")
	dropped(t, h.connect(), "connection to a closed registry")
}

func TestBadHeaders(t *testing.T) {
	for _, tt := range []struct {
		name   string
		header []byte
	}{
		{"empty name", []byte{0}},
		{"too long", append([]byte{200}, bytes.Repeat([]byte{'a'}, 200)...)},
		{"slash", []byte("\x03a/b")},
		{"control", []byte("\x02a\n")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHost(t, testLimits())
			c := h.connect()
			c.Write(tt.header)
			dropped(t, c, fmt.Sprintf("header %q", tt.header))
		})
	}
}

// FuzzStreamHeader checks that a header either names a stream that can be
// written again, or is an error, and that no more than it is read.
func FuzzStreamHeader(f *testing.F) {
	for _, seed := range []string{"", "\x01a", "\x05a", "\xff", "\x00", "\x03a/b", "\x02ab rest"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		name, err := api.ReadStreamHeader(r)
		if used := len(b) - r.Len(); used > 256 {
			t.Errorf("ReadStreamHeader read %d bytes; want at most 256", used)
		}
		if err != nil {
			return
		}
		var w bytes.Buffer
		if err := api.WriteStreamHeader(&w, name); err != nil {
			t.Errorf("WriteStreamHeader(%q) = %v; want nil for a name that was read", name, err)
		}
		if !bytes.HasPrefix(b, w.Bytes()) {
			t.Errorf("WriteStreamHeader(%q) = %q; want what was read: %q", name, w.Bytes(), b)
		}
	})
}
