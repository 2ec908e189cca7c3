package vsock_test

import (
	"context"
	"errors"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/vmrt/vmrt/pkg/vhostuser/vsock"
	"github.com/vmrt/vmrt/pkg/vhostuser/vsock/vsocktest"
)

func TestNew(t *testing.T) {
	for _, cid := range []uint32{0, 1, 2, 1<<32 - 1} {
		if _, err := vsock.New(vsock.Config{GuestCID: cid}); err == nil {
			t.Errorf("New(CID %d) = nil error; want one", cid)
		}
	}
}

func TestGuestCID(t *testing.T) {
	p := newStoppedPair(t, vsock.Config{}, vsocktest.Config{})
	if got := p.guest.CID(); got != guestCID {
		t.Errorf("CID in the configuration = %d; want %d", got, guestCID)
	}
}

// A Dial that comes before the driver waits for it.
func TestDialBeforeBoot(t *testing.T) {
	p := newStoppedPair(t, vsock.Config{}, vsocktest.Config{})
	l := p.guest.Listen(port)
	defer l.Close()
	type result struct {
		c   *vsock.Conn
		err error
	}
	dialled := make(chan result, 1)
	ctx := timeout(t)
	go func() {
		c, err := p.Dial(ctx, port)
		dialled <- result{c, err}
	}()
	// Another one gives up meanwhile.
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := p.Dial(short, port)
	wantErr(t, "Dial with a short deadline", err, context.DeadlineExceeded)

	if err := p.guest.Boot(); err != nil {
		t.Fatal(err)
	}
	r := <-dialled
	if r.err != nil {
		t.Fatalf("Dial before boot: %v; want a connection", r.err)
	}
	if got, want := r.c.RemoteAddr(), (vsock.Addr{CID: guestCID, Port: port}); got != want {
		t.Errorf("RemoteAddr() = %v; want %v", got, want)
	}
	guest, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := guest.RemoteAddr().String(), r.c.LocalAddr().String(); got != want {
		t.Errorf("guest's RemoteAddr() = %v; want %v", got, want)
	}
}

func TestDialRefused(t *testing.T) {
	p := newPair(t, vsock.Config{}, vsocktest.Config{})
	_, err := p.Dial(timeout(t), 99)
	wantErr(t, "Dial of a port without listener", err, syscall.ECONNREFUSED)
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "dial" || op.Addr != (vsock.Addr{CID: guestCID, Port: 99}) {
		t.Errorf("Dial: error %v; want an OpError of dial vm(%d):99", err, guestCID)
	}
}

// A guest that never answers keeps a Dial until its context ends. Its late
// answer is refused.
func TestDialUnanswered(t *testing.T) {
	packets := make(chan vsocktest.Header, 100)
	p := newPair(t, vsock.Config{}, vsocktest.Config{
		Silent:  true,
		Packets: func(h vsocktest.Header) { packets <- h },
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := p.Dial(ctx, port)
		done <- err
	}()
	req := <-packets
	if req.Op != vsocktest.OpRequest || req.DstPort != port || req.SrcCID != vsock.HostCID || req.DstCID != guestCID || req.Type != vsocktest.TypeStream {
		t.Errorf("first packet = %+v; want a request for port %d", req, port)
	}
	cancel()
	wantErr(t, "Dial", <-done, context.Canceled)
	if h := <-packets; h.Op != vsocktest.OpReset || h.SrcPort != req.SrcPort {
		t.Errorf("packet after the end of Dial = %+v; want a reset", h)
	}
	if err := p.guest.Send(p.guest.Header(port, req.SrcPort, vsocktest.OpResponse), nil); err != nil {
		t.Fatal(err)
	}
	if h := <-packets; h.Op != vsocktest.OpReset || h.SrcPort != req.SrcPort {
		t.Errorf("answer to a late response = %+v; want a reset", h)
	}
}

// Whatever ends the device ends a Dial, an Accept, a Read and a Write.
func TestEndOfDevice(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(p *pair)
		want error // of Dial and Accept; any if nil
	}{
		{"Close", func(p *pair) { p.Device.Close() }, net.ErrClosed},
		{"machine ends", func(p *pair) { p.guest.Close() }, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPair(t, vsock.Config{}, vsocktest.Config{Silent: true})
			host, guest := p.dialGuest(t)
			l, err := p.Listen(port)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := guest.Write([]byte("!last words")); err != nil {
				t.Fatal(err)
			}
			if n, err := host.Read(make([]byte, 1)); n != 1 || err != nil {
				t.Fatalf("Read(1 byte) = %d, %v; want 1 byte", n, err)
			}
			errs := make(chan error, 3)
			go func() {
				_, err := p.Dial(context.Background(), 5)
				errs <- err
			}()
			go func() {
				_, err := l.Accept()
				errs <- err
			}()
			written := make(chan error, 1)
			go func() {
				_, err := host.Write(make([]byte, 1<<20)) // more than the credit
				written <- err
			}()
			tc.end(p)
			for range 2 {
				if err := <-errs; err == nil || tc.want != nil && !errors.Is(err, tc.want) {
					t.Errorf("Dial or Accept at the end: error %v; want %v", err, tc.want)
				}
			}
			wantErr(t, "Write at the end", <-written, syscall.ECONNRESET)
			p.wait(t)

			// What had arrived can still be read.
			b := make([]byte, 100)
			if n, err := host.Read(b); err != nil || string(b[:n]) != "last words" {
				t.Errorf("Read after the end = %q, %v; want %q", b[:n], err, "last words")
			}
			_, err = host.Read(b)
			wantErr(t, "second Read after the end", err, syscall.ECONNRESET)
			if _, err := p.Dial(t.Context(), 5); err == nil {
				t.Error("Dial after the end = nil error; want one")
			}
			if _, err := p.Listen(7); err == nil {
				t.Error("Listen after the end = nil error; want one")
			}
			host.Close()
		})
	}
}

func TestServeResult(t *testing.T) {
	t.Run("machine ends", func(t *testing.T) {
		p := newPair(t, vsock.Config{}, vsocktest.Config{})
		p.guest.Close()
		if err := p.wait(t); err != nil {
			t.Errorf("Serve() = %v; want nil", err)
		}
	})
	t.Run("Close", func(t *testing.T) {
		p := newPair(t, vsock.Config{}, vsocktest.Config{})
		p.Device.Close()
		wantErr(t, "Serve()", p.wait(t), net.ErrClosed)
	})
}

func TestListen(t *testing.T) {
	p := newPair(t, vsock.Config{Backlog: 2}, vsocktest.Config{})
	if _, err := p.Listen(1<<32 - 1); err == nil {
		t.Error("Listen(any port) = nil error; want one")
	}
	l, err := p.Listen(port)
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.Listen(port)
	wantErr(t, "second Listen", err, syscall.EADDRINUSE)
	if got, want := l.Addr(), (vsock.Addr{CID: vsock.HostCID, Port: port}); got != want {
		t.Errorf("Addr() = %v; want %v", got, want)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err = l.AcceptContext(ctx)
	wantErr(t, "AcceptContext", err, context.DeadlineExceeded)

	// The third one finds the backlog full.
	var guests []*vsocktest.Conn
	for range 2 {
		g, err := p.guest.Dial(timeout(t), port)
		if err != nil {
			t.Fatal(err)
		}
		guests = append(guests, g)
	}
	_, err = p.guest.Dial(timeout(t), port)
	wantErr(t, "Dial with a full backlog", err, syscall.ECONNRESET)
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := c.RemoteAddr().String(), guests[0].LocalAddr().String(); got != want {
		t.Errorf("first accepted = %v; want %v", got, want)
	}
	// The second one was never accepted.
	l.Close()
	l.Close()
	b := make([]byte, 1)
	if _, err := guests[1].Read(b); err == nil {
		t.Error("Read of a connection that was not accepted = nil error; want one")
	}
	_, err = l.Accept()
	wantErr(t, "Accept after Close", err, net.ErrClosed)
	_, err = p.guest.Dial(timeout(t), port)
	wantErr(t, "Dial after Close", err, syscall.ECONNRESET)
	if _, err := p.Listen(port); err != nil {
		t.Errorf("Listen after Close = %v; want nil", err)
	}
}
