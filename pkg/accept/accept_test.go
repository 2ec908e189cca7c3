package accept

import (
	"errors"
	"net"
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// listener fails with one error after the other, and has a connection then.
type listener struct {
	net.Listener
	errs []error
}

func (l *listener) Accept() (net.Conn, error) {
	if len(l.errs) > 0 {
		err := l.errs[0]
		l.errs = l.errs[1:]
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", err)}
	}
	c, _ := net.Pipe()
	return c, nil
}

func (l *listener) Addr() net.Addr { return &net.UnixAddr{Name: "test", Net: "unix"} }

func TestNext(t *testing.T) {
	l := &listener{errs: []error{unix.EMFILE, unix.ENFILE, unix.ECONNABORTED, unix.ENOBUFS, unix.ENOMEM}}
	c, err := Next(l)
	if err != nil {
		t.Fatalf("Next() after shortages = %v; want a connection", err)
	}
	c.Close()
	for _, want := range []error{net.ErrClosed, syscall.EINVAL} {
		l.errs = []error{unix.EMFILE, want}
		if c, err := Next(l); !errors.Is(err, want) {
			t.Errorf("Next() = %v, %v; want %v", c, err, want)
		}
	}
}
