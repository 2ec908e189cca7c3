package qemu

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

func readLines(t testing.TB, r io.Reader) []string {
	t.Helper()
	var got []string
	l := lines{emit: func(s string) { got = append(got, s) }}
	hurry := make(chan struct{})
	close(hurry)
	l.read(r, hurry)
	return got
}

func TestLines(t *testing.T) {
	y := strings.Repeat("y", maxLine)
	tests := map[string]struct {
		in   string
		want []string
	}{
		"nothing":            {"", nil},
		"empty lines":        {"\n\r\n \n\x00\n", nil},
		"line ends":          {"a\nb\r\nc\rd", []string{"a", "b", "c", "d"}},
		"longest line":       {y + "\n", []string{y}},
		"longer line":        {y + "z\n", []string{y, "z"}},
		"much longer line":   {y + y + y, []string{y, y, y}},
		"escape sequences":   {"\x1b[2J\x1b]0;title\x07x\n", []string{"[2J]0;titlex"}},
		"no text":            {"\xff\xfe\n", []string{"?"}},
		"letters":            {"Grüße, 世界\n", []string{"Grüße, 世界"}},
		"direction override": {"a\u202eb\u2066c\n", []string{"abc"}},
		"tabs":               {"a\tb\n", []string{"a b"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, readLines(t, strings.NewReader(tt.in))); diff != "" {
				t.Errorf("read at once (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.want, readLines(t, iotest.OneByteReader(strings.NewReader(tt.in)))); diff != "" {
				t.Errorf("read byte by byte (-want +got):\n%s", diff)
			}
		})
	}
}

func TestTail(t *testing.T) {
	var l lines
	for i := range 3 * keptLines {
		l.add(fmt.Appendf(nil, "line %d", i))
	}
	got := l.tail()
	if len(got) != keptLines || got[0] != "line 40" || got[keptLines-1] != "line 59" {
		t.Errorf("tail() = %q; want lines 40 to 59", got)
	}
	if want := strings.Join(got, " | "); l.conclusion() != want {
		t.Errorf("conclusion() = %q; want %q", l.conclusion(), want)
	}
	l.add([]byte("[1.0] Kernel panic - not syncing: one"))
	l.add([]byte("Kernel panic - not syncing: two"))
	if got, want := l.conclusion(), "[1.0] Kernel panic - not syncing: one"; got != want {
		t.Errorf("conclusion() after a panic = %q; want %q", got, want)
	}
}

// TestReadPauses: many small writes become few reads.
func TestReadPauses(t *testing.T) {
	r, w := io.Pipe()
	reads := 0
	var l lines
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.read(readerFunc(func(b []byte) (int, error) { reads++; return r.Read(b) }), nil)
	}()
	start := time.Now()
	for range 10 {
		if _, err := w.Write([]byte("x\n")); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	<-done
	// An io.Pipe hands each write over by itself: ten reads, nine pauses.
	if d := time.Since(start); reads != 11 || d < 9*readInterval {
		t.Errorf("%d reads took %v; want 11 and at least %v", reads, d, 9*readInterval)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// FuzzLines: whatever the guest writes, and however it is cut, lines are
// bounded, printable text.
func FuzzLines(f *testing.F) {
	f.Add([]byte("[    0.000000] Linux version 6.12\r\n\x1b[0mlogin: "), uint8(7))
	f.Add([]byte("\xff\xc0\x80\xe2\x80"), uint8(1))
	f.Add(bytes.Repeat([]byte{'a'}, 3000), uint8(200))
	f.Fuzz(func(t *testing.T, in []byte, step uint8) {
		var got []string
		l := lines{emit: func(s string) { got = append(got, s) }}
		var pending []byte
		for rest := in; len(rest) > 0; {
			n := min(int(step)+1, len(rest))
			pending = l.split(append(pending, rest[:n]...))
			if len(pending) >= maxLine {
				t.Fatalf("%d bytes pending", len(pending))
			}
			rest = rest[n:]
		}
		l.add(pending)
		for _, s := range got {
			// An invalid byte becomes one of ASCII.
			if len(s) == 0 || len(s) > maxLine {
				t.Errorf("line of %d bytes", len(s))
			}
			if !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
				t.Errorf("line %q is not printable", s)
			}
		}
		if len(l.tail()) > keptLines {
			t.Errorf("%d lines kept", len(l.tail()))
		}
	})
}
