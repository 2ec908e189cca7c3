//go:build linux

package relay_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/relay"
)

// patience bounds what a test waits for; nothing waits that long when it works.
const patience = 20 * time.Second

// pair is two ends of a connection. TCP has a reset of its own; Unix sockets
// have none, as vsock.
type pair func(t *testing.T) (near, far relay.Conn)

func tcp(t *testing.T) (near, far relay.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return bounded(t, a), bounded(t, b)
}

func unixSockets(t *testing.T) (near, far relay.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]relay.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = bounded(t, c)
	}
	return ends[0], ends[1]
}

func bounded(t *testing.T, c net.Conn) relay.Conn {
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c.(relay.Conn)
}

var kinds = []struct {
	name string
	pair pair
}{{"tcp", tcp}, {"unix", unixSockets}}

// eachPair runs the test for every kind of connection on either side.
func eachPair(t *testing.T, test func(t *testing.T, client, server relay.Conn, joined <-chan error)) {
	for _, a := range kinds {
		for _, b := range kinds {
			t.Run(a.name+" "+b.name, func(t *testing.T) {
				client, near := a.pair(t)
				far, server := b.pair(t)
				joined := make(chan error, 1)
				go func() { joined <- relay.Join(near, far) }()
				test(t, client, server, joined)
			})
		}
	}
}

func result(t *testing.T, joined <-chan error) error {
	t.Helper()
	select {
	case err := <-joined:
		return err
	case <-time.After(patience):
		t.Fatal("Join has not returned")
		return nil
	}
}

func wantRead(t *testing.T, who string, c io.Reader, want string) {
	t.Helper()
	if got, err := io.ReadAll(c); string(got) != want || err != nil {
		t.Errorf("%s reads %q, %v; want %q", who, got, err, want)
	}
}

func TestHalfClose(t *testing.T) {
	eachPair(t, func(t *testing.T, client, server relay.Conn, joined <-chan error) {
		io.WriteString(client, "question")
		client.CloseWrite()
		wantRead(t, "the server", server, "question")
		io.WriteString(server, "answer")
		server.Close()
		wantRead(t, "the client", client, "answer")
		if err := result(t, joined); err != nil {
			t.Errorf("Join() = %v; want nil", err)
		}
	})
}

func TestServerEndsFirst(t *testing.T) {
	eachPair(t, func(t *testing.T, client, server relay.Conn, joined <-chan error) {
		io.WriteString(server, "greeting")
		server.CloseWrite()
		wantRead(t, "the client", client, "greeting")
		io.WriteString(client, "thanks")
		client.Close()
		wantRead(t, "the server", server, "thanks")
		if err := result(t, joined); err != nil {
			t.Errorf("Join() = %v; want nil", err)
		}
	})
}

// isReset reports whether c is broken, in the way of its protocol: of Unix
// sockets that is an end in both directions.
func isReset(c relay.Conn) bool {
	_, err := io.ReadAll(c)
	if _, tcp := c.(*net.TCPConn); tcp {
		return errors.Is(err, unix.ECONNRESET)
	}
	_, werr := c.Write([]byte("x"))
	return errors.Is(werr, unix.EPIPE) || errors.Is(werr, unix.ECONNRESET)
}

func TestReset(t *testing.T) {
	for _, who := range []string{"client", "server"} {
		t.Run("by the "+who, func(t *testing.T) {
			eachPair(t, func(t *testing.T, client, server relay.Conn, joined <-chan error) {
				breaks, other := client, server
				if who == "server" {
					breaks, other = server, client
				}
				io.WriteString(breaks, "cut")
				if _, err := io.ReadFull(other, make([]byte, 3)); err != nil {
					t.Fatal(err)
				}
				relay.Abort(breaks)
				if err := result(t, joined); err == nil {
					t.Error("Join() = nil; want the reset")
				}
				if !isReset(other) {
					t.Error("the other end sees no reset; want one")
				}
			})
		})
	}
}

// The whole end of a connection is a reset only if the stream towards it was
// still open, and data before it is not lost to that.
func TestCloseAfterEnd(t *testing.T) {
	client, near := unixSockets(t)
	far, server := tcp(t)
	joined := make(chan error, 1)
	go func() { joined <- relay.Join(near, far) }()
	server.CloseWrite()
	wantRead(t, "the client", client, "")
	want := random(1 << 20)
	go func() {
		client.Write(want)
		client.Close()
	}()
	if got, err := io.ReadAll(server); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the server reads %d bytes, %v; want the %d sent", len(got), err, len(want))
	}
	if err := result(t, joined); err != nil {
		t.Errorf("Join() = %v; want nil", err)
	}
}

// A peer that says by a method what its socket would say.
type closer struct {
	relay.Conn
	closed bool
}

func (c closer) PeerClosed() bool { return c.closed }

func TestPeerClosedMethod(t *testing.T) {
	for _, closed := range []bool{false, true} {
		t.Run(fmt.Sprint(closed), func(t *testing.T) {
			client, near := unixSockets(t)
			far, server := tcp(t)
			joined := make(chan error, 1)
			go func() { joined <- relay.Join(closer{near, closed}, far) }()
			client.CloseWrite()
			_, err := io.ReadAll(server)
			if reset := errors.Is(err, unix.ECONNRESET); reset != closed {
				t.Errorf("the server's read = %v; want a reset: %v", err, closed)
			}
			server.Close()
			if err := result(t, joined); errors.Is(err, relay.ErrReset) != closed {
				t.Errorf("Join() = %v; want %v: %v", err, relay.ErrReset, closed)
			}
		})
	}
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{3}).Read(b)
	return b
}

func TestBothWays(t *testing.T) {
	eachPair(t, func(t *testing.T, client, server relay.Conn, joined <-chan error) {
		const size = 16 << 20
		data := random(size)
		for _, c := range []relay.Conn{client, server} {
			go func() {
				c.Write(data)
				c.CloseWrite()
			}()
		}
		sums := make(chan [32]byte)
		for _, c := range []relay.Conn{client, server} {
			go func() {
				sum := sha256.New()
				io.Copy(sum, c)
				sums <- [32]byte(sum.Sum(nil))
			}()
		}
		for range 2 {
			if <-sums != sha256.Sum256(data) {
				t.Error("what arrived is not what was sent")
			}
		}
		if err := result(t, joined); err != nil {
			t.Errorf("Join() = %v; want nil", err)
		}
	})
}

func TestAbortEndsJoin(t *testing.T) {
	client, near := tcp(t)
	far, server := unixSockets(t)
	joined := make(chan error, 1)
	go func() { joined <- relay.Join(near, far) }()
	// One direction waits for the server to read, the other for it to write.
	go client.Write(make([]byte, 64<<20))
	if _, err := io.ReadFull(server, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	relay.Abort(near)
	relay.Abort(far)
	if err := result(t, joined); err == nil {
		t.Error("Join() = nil; want an error after Abort")
	}
}

// deadlines counts the changes of a connection's state between silent and
// busy: the deadline that is taken away says silent.
type deadlines struct {
	net.Conn
	silent chan struct{}
}

func (d *deadlines) SetReadDeadline(t time.Time) error {
	if t.IsZero() {
		d.silent <- struct{}{}
	}
	return d.Conn.SetReadDeadline(t)
}

// A direction that falls silent goes on when there is something again.
func TestSilence(t *testing.T) {
	src, writer := tcp(t)
	reader, dst := unixSockets(t)
	d := &deadlines{src, make(chan struct{}, 16)}
	copied := make(chan error, 1)
	go func() {
		copied <- relay.CopyStream(dst, d, 5*time.Millisecond)
		dst.CloseWrite()
	}()
	for _, size := range []int{1, relay.IdleSize, 100 << 10, 5 * relay.IdleSize} {
		data := random(size)
		writer.Write(data)
		got := make([]byte, size)
		if _, err := io.ReadFull(reader, got); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("%d bytes do not arrive: %v", size, err)
		}
		if size < relay.IdleSize {
			continue // it never was busy
		}
		select {
		case <-d.silent:
		case <-time.After(patience):
			t.Fatalf("after %d bytes the direction keeps its buffer", size)
		}
	}
	writer.CloseWrite()
	if err := <-copied; err != nil {
		t.Errorf("copy = %v; want nil at the source's end", err)
	}
	wantRead(t, "the destination", reader, "")
}
