//go:build linux

package daemon

import (
	"strings"
	"testing"
)

func TestTail(t *testing.T) {
	var long tail
	text := strings.Repeat("x", 3*tailSize) + "the end"
	if n, err := long.ReadFrom(strings.NewReader(text)); n != int64(len(text)) || err != nil {
		t.Errorf("ReadFrom = %d, %v; want %d, nil", n, err, len(text))
	}
	if s := long.String(); len(s) != tailSize+2 || !strings.HasSuffix(s, "xthe end") {
		t.Errorf("tail of %d bytes has %d; want the last %d", len(text), len(s), tailSize)
	}
	var lines tail
	lines.ReadFrom(strings.NewReader("a\nb\xff\n"))
	if got, want := lines.String(), ": a; b?"; got != want {
		t.Errorf("String() = %q; want %q", got, want)
	}
	if got := new(tail).String(); got != "" {
		t.Errorf("String() of nothing = %q; want nothing", got)
	}
}
