//go:build linux

// Package relay joins two connections so that each end sees of the other what
// it would see if they were one: bytes, the end of either direction, and a
// reset. Both sides of a virtual machine use it.
//
// Contract. Join takes both connections over. A direction that ends is ended
// on the other connection with CloseWrite, and the other direction goes on for
// as long as it likes: nothing here has a timeout. Once both have ended, both
// connections are closed. Any failure, of either connection or direction,
// resets both.
//
// A protocol that has no reset of its own, such as AF_VSOCK, carries it as
// this: a peer that closes whole while the stream towards it is still open has
// reset the connection. Linux tells that apart from a half-close by a send(2)
// of nothing, which fails once the peer takes no more (net/vmw_vsock/af_vsock.c,
// vsock_connectible_sendmsg); a connection that is no socket says it by a
// method, PeerClosed() bool.
//
// A direction that is silent holds no more than a small buffer.
//
// Not guaranteed: that the reset of a connection is noticed while what came
// from it waits for the other one to take it.
package relay

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Conn is a connection whose writing side ends alone.
type Conn interface {
	net.Conn
	// CloseWrite ends the stream towards the peer. Reading goes on.
	CloseWrite() error
}

// ErrReset is returned when a peer has closed a connection, in a way that has
// no error of its own, before the stream towards it had ended.
var ErrReset = errors.New("connection closed before its end")

const (
	// idleSize is what a silent direction waits with, in bytes. What fits is
	// moved by it.
	idleSize = 1 << 10
	// bufferSize is what one read of a busy direction moves at most.
	bufferSize = 32 << 10
	// idleAfter is how long a busy direction may be silent before it gives
	// its buffer back.
	idleAfter = time.Second
)

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// Join relays between a and b until both directions have ended or one has
// failed, whose error it returns. Both connections are closed then. To end it
// early, Abort both connections.
func Join(a, b Conn) error {
	j := &join{}
	ab, ba := &direction{src: a, dst: b}, &direction{src: b, dst: a}
	ab.back, ba.back = ba, ab
	var other sync.WaitGroup
	other.Go(func() { j.run(ba) })
	j.run(ab)
	other.Wait()
	if j.err == nil {
		return errors.Join(a.Close(), b.Close())
	}
	return j.err
}

// join is a pair of directions.
type join struct {
	mu  sync.Mutex
	err error // the first failure
}

// direction moves what comes from src to dst.
type direction struct {
	src, dst Conn
	back     *direction
	ended    atomic.Bool // dst was told, or is about to be
}

// run ends with the direction. The first failure ends the other one too.
func (j *join) run(d *direction) {
	err := d.move()
	if err == nil {
		return
	}
	j.mu.Lock()
	first := j.err == nil
	if first {
		j.err = err
	}
	j.mu.Unlock()
	if first {
		Abort(d.src)
		Abort(d.dst)
	}
}

func (d *direction) move() error {
	if err := copyStream(d.dst, d.src, idleAfter); err != nil {
		return err
	}
	// It is ended before the peer can answer to that.
	d.ended.Store(true)
	if !d.back.ended.Load() && peerClosed(d.src) {
		return fmt.Errorf("read %s: %w", d.src.RemoteAddr(), ErrReset)
	}
	return d.dst.CloseWrite()
}

// Abort closes c so that the peer takes it for broken, where its protocol can
// say that: TCP sends a reset. What was written and is not sent yet is lost.
func Abort(c net.Conn) {
	if l, ok := c.(interface{ SetLinger(sec int) error }); ok {
		l.SetLinger(0) // a connection that has ended already needs none
	}
	c.Close()
}

// peerClosed reports whether the peer of c, whose stream has ended, takes no
// more either.
func peerClosed(c Conn) bool {
	switch c := c.(type) {
	case interface{ PeerClosed() bool }:
		return c.PeerClosed()
	case syscall.Conn:
		return refusesBytes(c)
	}
	return false
}

// copyStream copies until src ends, which is no error.
func copyStream(dst io.Writer, src net.Conn, idle time.Duration) error {
	small := make([]byte, idleSize)
	for {
		n, err := src.Read(small)
		if n > 0 {
			if _, err := dst.Write(small[:n]); err != nil {
				return err
			}
		}
		if err == nil && n == len(small) {
			err = copyBusy(dst, src, idle)
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}

// copyBusy copies through a whole buffer until src was silent for once to
// twice idle, which is no error. The deadline is set once in a while
// instead of for each read.
func copyBusy(dst io.Writer, src net.Conn, idle time.Duration) error {
	buf := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buf)
	for {
		if err := src.SetReadDeadline(time.Now().Add(idle)); err != nil {
			return err
		}
		moved, err := copyUntilError(dst, src, buf[:])
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if !moved {
			return src.SetReadDeadline(time.Time{})
		}
	}
}

// copyUntilError returns the first error, which for src's end is io.EOF, and
// whether anything was read before.
func copyUntilError(dst io.Writer, src io.Reader, buf []byte) (moved bool, err error) {
	for {
		n, err := src.Read(buf)
		if n > 0 {
			moved = true
			if _, err := dst.Write(buf[:n]); err != nil {
				return moved, err
			}
		}
		if err != nil {
			return moved, err
		}
	}
}
