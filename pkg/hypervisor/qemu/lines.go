package qemu

import (
	"bytes"
	"io"
	"strings"
	"sync"
	"time"
	"unicode"
)

const (
	// maxLine bounds a line that the guest or QEMU writes, in bytes. The
	// rest of a longer one is a line of its own.
	maxLine = 512
	// keptLines is how many lines an error can quote.
	keptLines = 20
	// readInterval is the least time between two reads. QEMU writes the
	// guest's console byte by byte, so it makes one read of many; and with
	// readSize it bounds what a guest can make its reader do to 400 KiB/s.
	readInterval = 10 * time.Millisecond
	readSize     = 4 << 10
)

// lines turns what the guest or QEMU writes into printable lines of bounded
// length, hands each to a callback and keeps the last ones. The writer is
// hostile; the callback sees no control characters.
type lines struct {
	// emit is called from the reading goroutine with each line that is not
	// empty. May be nil.
	emit func(string)

	mu    sync.Mutex
	last  []string // guarded by mu; at most keptLines
	panic string   // guarded by mu; the first line that is a kernel's panic
}

// kernelPanic is in the line by which Linux says why it stops (kernel/panic.c).
const kernelPanic = "Kernel panic - not syncing"

// read reads r until its end. Once hurry is closed it reads at full speed.
func (l *lines) read(r io.Reader, hurry <-chan struct{}) {
	var pending []byte
	buf := make([]byte, readSize)
	pause := time.NewTimer(readInterval)
	defer pause.Stop()
	for {
		n, err := r.Read(buf)
		pending = l.split(append(pending, buf[:n]...))
		if err != nil {
			l.add(pending)
			return
		}
		pause.Reset(readInterval)
		select {
		case <-pause.C:
		case <-hurry:
		}
	}
}

// split adds the lines that b holds and returns what is left of it: the start
// of a line, shorter than maxLine.
func (l *lines) split(b []byte) []byte {
	for {
		i := bytes.IndexAny(b, "\r\n")
		switch {
		case i >= 0 && i <= maxLine:
			l.add(b[:i])
			b = b[i+1:]
		case len(b) >= maxLine:
			l.add(b[:maxLine])
			b = b[maxLine:]
		default:
			return append([]byte(nil), b...)
		}
	}
}

func (l *lines) add(b []byte) {
	s := printable(b)
	if s == "" {
		return
	}
	l.mu.Lock()
	if len(l.last) == keptLines {
		l.last = append(l.last[:0], l.last[1:]...)
	}
	l.last = append(l.last, s)
	if l.panic == "" && strings.Contains(s, kernelPanic) {
		l.panic = s
	}
	l.mu.Unlock()
	if l.emit != nil {
		l.emit(s)
	}
}

// tail returns the last lines, oldest first.
func (l *lines) tail() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]string(nil), l.last...)
}

// conclusion returns what is worth quoting when the writer has ended: a panic,
// or else the last lines.
func (l *lines) conclusion() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.panic != "" {
		return l.panic
	}
	return strings.Join(l.last, " | ")
}

// printable returns b as valid UTF-8 without control and format characters
// and without space around it.
func printable(b []byte) string {
	s := strings.Map(func(r rune) rune {
		switch {
		case r == '\t':
			return ' '
		case unicode.IsPrint(r):
			return r
		}
		return -1
	}, strings.ToValidUTF8(string(b), "?"))
	return strings.TrimSpace(s)
}
