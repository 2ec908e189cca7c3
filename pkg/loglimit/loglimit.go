// Package loglimit bounds what a process logs.
//
// Much of what a shim has to say is about its guest, which can give it occasion
// to say it as often as it likes, also through libraries that log by themselves.
// The log is the host's, and its disk.
//
// Contract. A Writer passes on what is written to it, one line a Write, for as
// long as there are bytes left of what it may write: Burst at first, and Rate
// more each second up to Burst again. A line that is too long is cut. A line for
// which there is nothing left is dropped; with the next one that is not, a line
// says how many were.
//
// Concurrency: one Write at a time, as loggers do.
//
// Not guaranteed: that what matters is among what is passed on while somebody
// floods the log.
package loglimit

import (
	"bytes"
	"fmt"
	"io"
	"time"
)

const (
	// Burst is what can be written at once, in bytes.
	Burst = 1 << 20
	// Rate is what can be written in the long run, in bytes a second.
	Rate = 16 << 10
	// MaxLine bounds a line, in bytes. The stacks of all goroutines, which a
	// signal has logged, are one.
	MaxLine = 128 << 10
)

// Writer passes on lines. See New.
type Writer struct {
	dst     io.Writer
	now     func() time.Time
	left    float64 // bytes, as of filled
	filled  time.Time
	dropped int
}

// New returns a Writer to dst.
func New(dst io.Writer) *Writer {
	return &Writer{dst: dst, now: time.Now, left: Burst, filled: time.Now()}
}

var ellipsis = []byte("…\n")

// Write implements io.Writer. A line that is dropped is no error.
func (w *Writer) Write(line []byte) (int, error) {
	n := len(line)
	if n > MaxLine {
		line = append(bytes.ToValidUTF8(line[:MaxLine-len(ellipsis)], nil), ellipsis...)
	}
	now := w.now()
	w.left = min(w.left+now.Sub(w.filled).Seconds()*Rate, Burst)
	w.filled = now
	if w.left < float64(len(line)) {
		w.dropped++
		return n, nil
	}
	w.left -= float64(len(line))
	if w.dropped > 0 {
		note := fmt.Sprintf("time=%q level=warning msg=\"%d lines were dropped here: more than %d bytes a second\"\n", now.Format(time.RFC3339Nano), w.dropped, Rate)
		w.left -= float64(len(note)) // perhaps below 0
		if _, err := io.WriteString(w.dst, note); err != nil {
			return 0, err
		}
		w.dropped = 0
	}
	if _, err := w.dst.Write(line); err != nil {
		return 0, err
	}
	return n, nil
}
