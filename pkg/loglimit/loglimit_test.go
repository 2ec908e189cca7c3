package loglimit

import (
	"bytes"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// at returns a Writer with a clock that the test moves.
func at(out *bytes.Buffer) (*Writer, *time.Time) {
	clock := time.Now()
	w := New(out)
	w.now = func() time.Time { return clock }
	w.filled = clock
	return w, &clock
}

func write(t *testing.T, w *Writer, line string) {
	t.Helper()
	if n, err := w.Write([]byte(line)); n != len(line) || err != nil {
		t.Fatalf("Write(%d bytes) = %d, %v; want %d, nil", len(line), n, err, len(line))
	}
}

func TestPassesOn(t *testing.T) {
	var out bytes.Buffer
	w, clock := at(&out)
	var want strings.Builder
	// What a busy pod logs: for an hour, a hundred bytes a tenth of a second.
	for range 36000 {
		line := strings.Repeat("x", 99) + "\n"
		want.WriteString(line)
		write(t, w, line)
		*clock = clock.Add(100 * time.Millisecond)
	}
	if out.String() != want.String() {
		t.Errorf("passed on %d bytes; want all %d", out.Len(), want.Len())
	}
}

func TestFlood(t *testing.T) {
	var out bytes.Buffer
	w, clock := at(&out)
	line := strings.Repeat("f", 999) + "\n"
	const seconds = 60
	written := 0
	for range seconds * 1000 {
		write(t, w, line)
		written++
		*clock = clock.Add(time.Millisecond)
	}
	if limit := Burst + seconds*Rate*11/10; out.Len() > limit {
		t.Errorf("a flood of %d bytes left %d; want at most %d", written*len(line), out.Len(), limit)
	}
	if out.Len() < Burst {
		t.Errorf("a flood left %d bytes; want the %d of a burst", out.Len(), Burst)
	}
	out.Reset()
	*clock = clock.Add(time.Minute)
	write(t, w, "after\n")
	lines := strings.Split(out.String(), "\n")
	if len(lines) != 3 || !strings.Contains(lines[0], "lines were dropped here") || lines[1] != "after" {
		t.Errorf("after a flood: %q; want how much was dropped, and the line", out.String())
	}
	out.Reset()
	write(t, w, "again\n")
	if out.String() != "again\n" {
		t.Errorf("then: %q; want the line alone", out.String())
	}
}

func TestLongLine(t *testing.T) {
	var out bytes.Buffer
	w, _ := at(&out)
	write(t, w, strings.Repeat("ü", 1<<20)+"\n")
	if got := out.String(); len(got) > MaxLine || len(got) < MaxLine-8 || !utf8.ValidString(got) || !strings.HasSuffix(got, "ü…\n") {
		t.Errorf("a long line became %d bytes, %q at their end; want at most %d", len(got), got[len(got)-20:], MaxLine)
	}
}
