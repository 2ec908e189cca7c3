// Package accept takes connections from listeners in spite of shortages: a
// server that ends because its process was out of descriptors for a moment is
// gone for good.
package accept

import (
	"errors"
	"net"
	"syscall"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// pause lets a shortage pass. Nothing tells when it has.
const pause = 20 * time.Millisecond

// Next returns l's next connection, or an error after which there will be none:
// net.ErrClosed, if l was closed. It waits while accept(2) fails for want of
// memory or descriptors, and logs that.
func Next(l net.Listener) (net.Conn, error) {
	for {
		c, err := l.Accept()
		if err == nil || !transient(err) {
			return c, err
		}
		log.L.WithError(err).Warnf("accept at %v", l.Addr())
		time.Sleep(pause)
	}
}

// transient reports whether accept(2) may succeed the next time.
func transient(err error) bool {
	for _, errno := range []syscall.Errno{unix.ECONNABORTED, unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}
