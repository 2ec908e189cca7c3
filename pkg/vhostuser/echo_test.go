package vhostuser_test

import (
	"context"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/vhostuser"
	"github.com/vmrt/vmrt/pkg/vhostuser/vhosttest"
)

const (
	echoQueues = 2
	queueSize  = 8
)

// echo is a device that answers what it reads in each chain, reversed.
type echo struct {
	backend *vhostuser.Backend
	config  []byte

	mu     sync.Mutex
	resets int
	chain  vhostuser.Chain
}

func newEcho() *echo {
	d := &echo{config: []byte("configuration")}
	d.backend = vhostuser.NewBackend(d, echoQueues, &d.mu)
	return d
}

func (d *echo) Features() uint64 { return 1 }
func (d *echo) Config() []byte   { return d.config }

func (d *echo) Reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.resets++
}

func (d *echo) Kicked(i int) (more bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	q := d.backend.Queue(i)
	defer q.Flush()
	for range 4 {
		ok, err := q.Next(&d.chain)
		if err != nil {
			d.backend.Fail(err)
			return false
		}
		if !ok {
			return q.WantKick()
		}
		in := make([]byte, d.chain.Readable.Len())
		d.chain.Readable.Read(in)
		slices.Reverse(in)
		q.Done(&d.chain, uint32(d.chain.Writable.Write(in)))
	}
	return true
}

// writableEcho also lets its configuration be written.
type writableEcho struct{ *echo }

func (d writableEcho) WriteConfig(offset uint32, data []byte) error {
	if uint64(offset)+uint64(len(data)) > uint64(len(d.config)) {
		return unix.EINVAL
	}
	copy(d.config[offset:], data)
	return nil
}

// serving is a back end at work, with its machine.
type serving struct {
	*vhosttest.Machine
	dev   *echo
	front *net.UnixConn // the Machine's
	stop  context.CancelFunc
	done  chan struct{}
	err   error // of Serve; set before done is closed
}

// serve connects a new machine to an echo device. The test's end closes both.
func serve(t testing.TB) *serving {
	t.Helper()
	dev := newEcho()
	return serveBackend(t, dev, dev.backend)
}

func serveBackend(t testing.TB, dev *echo, backend *vhostuser.Backend) *serving {
	t.Helper()
	front, back := socketpair(t)
	m, err := vhosttest.New(front, 4<<20)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	s := &serving{Machine: m, dev: dev, front: front, stop: stop, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		s.err = backend.Serve(ctx, back)
	}()
	t.Cleanup(func() {
		stop()
		m.Close()
	})
	return s
}

// start brings the machine's queues up.
func (s *serving) start(t testing.TB) {
	t.Helper()
	if _, err := s.Connect(echoQueues, queueSize, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
}

// wait returns what Serve returned.
func (s *serving) wait(t testing.TB) error {
	t.Helper()
	select {
	case <-s.done:
		return s.err
	case <-time.After(10 * time.Second):
		t.Fatal("Serve goes on; want its end")
		return nil
	}
}

// wantEnd waits for Serve to end with an error that contains want.
func (s *serving) wantEnd(t testing.TB, want string) {
	t.Helper()
	if err := s.wait(t); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Serve() = %v; want an error with %q", err, want)
	}
}

func socketpair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn := func(fd int) *net.UnixConn {
		f := os.NewFile(uintptr(fd), "socketpair")
		defer f.Close()
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		return c.(*net.UnixConn)
	}
	return conn(fds[0]), conn(fds[1])
}

// echoed sends pieces through queue i and returns what comes back.
func (s *serving) echoed(t testing.TB, i int, add func(...vhosttest.Buffer) (uint16, bool), pieces ...string) string {
	t.Helper()
	var bufs []vhosttest.Buffer
	total := 0
	for _, p := range pieces {
		addr, mem := s.Alloc(len(p))
		copy(mem, p)
		bufs = append(bufs, vhosttest.Buffer{Addr: addr, Len: uint32(len(p))})
		total += len(p)
	}
	// The answer is spread as well.
	var answer [][]byte
	for _, n := range []int{total / 2, total - total/2} {
		addr, mem := s.Alloc(n)
		answer = append(answer, mem)
		bufs = append(bufs, vhosttest.Buffer{Addr: addr, Len: uint32(n), Write: true})
	}
	head, ok := add(bufs...)
	if !ok {
		t.Fatalf("Add(%d buffers): queue is full", len(bufs))
	}
	q := s.Queue(i)
	q.Kick()
	got, n, err := q.TakeWait()
	if err != nil {
		t.Fatal(err)
	}
	if got != head || int(n) != total {
		t.Errorf("used entry = {%d, %d}; want {%d, %d}", got, n, head, total)
	}
	return string(answer[0]) + string(answer[1])
}
