package vsock_test

import (
	"errors"
	"io"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmrt/vmrt/pkg/vhostuser/vsock"
	"github.com/vmrt/vmrt/pkg/vhostuser/vsock/vsocktest"
)

// recorder keeps the headers of packets that a guest gets.
type recorder chan vsocktest.Header

func (r recorder) config() vsocktest.Config {
	return vsocktest.Config{Silent: true, Packets: func(h vsocktest.Header) { r <- h }}
}

// next returns the next packet.
func (r recorder) next(t *testing.T) vsocktest.Header {
	t.Helper()
	select {
	case h := <-r:
		return h
	case <-time.After(patience):
		t.Fatal("no packet; want one")
		return vsocktest.Header{}
	}
}

// Packets that belong to no connection are answered with a reset that mirrors
// them, or not at all.
func TestStrayPackets(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(h *vsocktest.Header)
		reset  bool
	}{
		{"data", func(h *vsocktest.Header) { h.Op = vsocktest.OpRW }, true},
		{"response", func(h *vsocktest.Header) { h.Op = vsocktest.OpResponse }, true},
		{"shutdown", func(h *vsocktest.Header) { h.Op = vsocktest.OpShutdown }, true},
		{"credit request", func(h *vsocktest.Header) { h.Op = vsocktest.OpCreditRequest }, true},
		{"unknown operation", func(h *vsocktest.Header) { h.Op = 77 }, true},
		{"request without listener", func(h *vsocktest.Header) { h.Op = vsocktest.OpRequest }, true},
		{"reset", func(h *vsocktest.Header) { h.Op = vsocktest.OpReset }, false},
		{"seqpacket", func(h *vsocktest.Header) { h.Type, h.Op = 2, vsocktest.OpRequest }, true},
		{"another host", func(h *vsocktest.Header) { h.DstCID, h.Op = 77, vsocktest.OpRequest }, true},
		{"another guest", func(h *vsocktest.Header) { h.SrcCID, h.Op = 77, vsocktest.OpRequest }, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			packets := make(recorder, 10)
			p := newPair(t, vsock.Config{}, packets.config())
			h := p.guest.Header(500, 600, 0)
			tc.change(&h)
			for range 3 {
				if err := p.guest.Send(h, nil); err != nil {
					t.Fatal(err)
				}
			}
			// A packet that is answered in any case ends the wait for those
			// that are not.
			if err := p.guest.Send(p.guest.Header(1, 1, vsocktest.OpRW), nil); err != nil {
				t.Fatal(err)
			}
			want := vsocktest.Header{
				SrcCID: h.DstCID, DstCID: guestCID, SrcPort: 600, DstPort: 500,
				Type: h.Type, Op: vsocktest.OpReset,
			}
			for range 3 {
				if !tc.reset {
					break
				}
				if diff := cmp.Diff(want, packets.next(t)); diff != "" {
					t.Errorf("answer (-want +got):\n%s", diff)
				}
			}
			if got := packets.next(t); got.SrcPort != 1 {
				t.Errorf("packet %+v; want no other answer", got)
			}
		})
	}
}

// A guest that breaks the rules on a connection loses it, and no other.
func TestHostilePackets(t *testing.T) {
	for _, tc := range []struct {
		name string
		send func(p *pair, local, remote uint32) error
	}{
		{"more than the credit", func(p *pair, local, remote uint32) error {
			h := p.guest.Header(local, remote, vsocktest.OpRW)
			for range 20 {
				if err := p.guest.Send(h, make([]byte, 64<<10)); err != nil {
					return err
				}
			}
			return nil
		}},
		{"second request", func(p *pair, local, remote uint32) error {
			return p.guest.Send(p.guest.Header(local, remote, vsocktest.OpRequest), nil)
		}},
		{"second response", func(p *pair, local, remote uint32) error {
			return p.guest.Send(p.guest.Header(local, remote, vsocktest.OpResponse), nil)
		}},
		{"unknown operation", func(p *pair, local, remote uint32) error {
			return p.guest.Send(p.guest.Header(local, remote, 99), nil)
		}},
		{"data after the end", func(p *pair, local, remote uint32) error {
			h := p.guest.Header(local, remote, vsocktest.OpShutdown)
			h.Flags = 2
			if err := p.guest.Send(h, nil); err != nil {
				return err
			}
			return p.guest.Send(p.guest.Header(local, remote, vsocktest.OpRW), []byte("x"))
		}},
		{"longer than its buffer", func(p *pair, local, remote uint32) error {
			return sendRaw(p, p.guest.Header(local, remote, vsocktest.OpRW), 1<<20)
		}},
		{"longest length", func(p *pair, local, remote uint32) error {
			return sendRaw(p, p.guest.Header(local, remote, vsocktest.OpRW), 1<<32-1)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			packets := make(recorder, 1000)
			p := newPair(t, vsock.Config{}, packets.config())
			host, guest := p.dialGuest(t)
			other, otherGuest := p.dialGuest(t)
			local := guest.LocalAddr().(vsock.Addr).Port
			remote := guest.RemoteAddr().(vsock.Addr).Port
			if err := tc.send(p, local, remote); err != nil {
				t.Fatal(err)
			}
			for h := packets.next(t); h.Op != vsocktest.OpReset; h = packets.next(t) {
			}
			_, err := host.Write([]byte("x"))
			wantErr(t, "Write", err, syscall.ECONNRESET)
			otherGuest.Write([]byte("fine"))
			otherGuest.Close()
			if got, err := io.ReadAll(other); err != nil || string(got) != "fine" {
				t.Errorf("the other connection reads %q, %v; want %q", got, err, "fine")
			}
		})
	}
}

// sendRaw sends a header alone that claims a payload of n bytes.
func sendRaw(p *pair, h vsocktest.Header, n uint32) error {
	h.Len = n
	return p.guest.SendRaw(h.Append(nil))
}

// Packets without a whole header are dropped.
func TestShortPackets(t *testing.T) {
	packets := make(recorder, 10)
	p := newPair(t, vsock.Config{}, packets.config())
	for n := range 44 {
		if err := p.guest.SendRaw(make([]byte, n)); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.guest.Send(p.guest.Header(1, 1, vsocktest.OpRW), nil); err != nil {
		t.Fatal(err)
	}
	if got := packets.next(t); got.SrcPort != 1 {
		t.Errorf("packet %+v; want no answer to packets without header", got)
	}
}

// A guest that provokes answers and takes none stops being served, until it
// takes them.
func TestReplyFlood(t *testing.T) {
	const flood = 1000
	packets := make(recorder, flood)
	gcfg := packets.config()
	gcfg.RxBuffers = -1
	p := newPair(t, vsock.Config{}, gcfg)
	sent := make(chan struct{}, flood)
	go func() {
		for range flood {
			if p.guest.Send(p.guest.Header(500, 600, vsocktest.OpRW), nil) != nil {
				return
			}
			sent <- struct{}{}
		}
	}()
	// 256 replies, and what the queue holds.
	waitFor(t, "stop of the guest", func() bool {
		n := len(sent)
		time.Sleep(20 * time.Millisecond)
		return n >= 256 && n == len(sent)
	})
	if n := len(sent); n < 256 || n > 256+128 {
		t.Errorf("device has taken %d packets; want 256, and up to 128 more in the queue", n)
	}
	p.guest.AddRxBuffers(5)
	for i := range flood {
		if h := packets.next(t); h.Op != vsocktest.OpReset || h.DstPort != 500 {
			t.Fatalf("answer %d = %+v; want a reset", i, h)
		}
	}
}

// A buffer without room for a payload would make sending go round in circles.
func TestTinyRxBuffer(t *testing.T) {
	p := newPair(t, vsock.Config{}, vsocktest.Config{RxBuffers: -1})
	p.guest.AddRxBuffer(44)
	_, err := p.Dial(timeout(t), port)
	if err == nil {
		t.Error("Dial = nil error; want one")
	}
	if err := p.wait(t); err == nil || !strings.Contains(err.Error(), "vsock rx queue: buffer of 44 bytes") {
		t.Errorf("Serve() = %v; want an error about the buffer", err)
	}
}

func TestBrokenQueue(t *testing.T) {
	for _, q := range []string{"rx", "tx"} {
		t.Run(q, func(t *testing.T) {
			// Anything sent would mend the index.
			p := newPair(t, vsock.Config{}, vsocktest.Config{Silent: true})
			i := strings.Index("rx tx", q) / 3
			p.guest.Break(i)
			// The rx queue is looked at when there is something to send.
			_, err := p.Dial(timeout(t), port)
			if err == nil {
				t.Error("Dial = nil error; want one")
			}
			if err := p.wait(t); err == nil || !strings.Contains(err.Error(), "vsock "+q+" queue: available index") {
				t.Errorf("Serve() = %v; want an error about the %s queue", err, q)
			}
		})
	}
}

func TestMaxConns(t *testing.T) {
	t.Run("from host", func(t *testing.T) {
		// This guest never confirms the end of a connection.
		p := newPair(t, vsock.Config{MaxConns: 2, CloseTimeout: 300 * time.Millisecond}, vsocktest.Config{})
		host, guest := p.dialGuest(t)
		p.dialGuest(t)
		_, err := p.Dial(timeout(t), port)
		wantErr(t, "Dial of the third", err, syscall.EMFILE)
		guest.Mute()
		host.Close()
		_, err = p.Dial(timeout(t), port)
		wantErr(t, "Dial before the guest has confirmed", err, syscall.EMFILE)
		waitFor(t, "end of the connection", func() bool {
			_, err := p.Dial(timeout(t), port)
			return errors.Is(err, syscall.ECONNREFUSED)
		})
	})
	t.Run("from guest", func(t *testing.T) {
		p := newPair(t, vsock.Config{MaxConns: 2}, vsocktest.Config{})
		l, err := p.Listen(port)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if _, err := p.guest.Dial(timeout(t), port); err != nil {
				t.Fatal(err)
			}
		}
		_, err = p.guest.Dial(timeout(t), port)
		wantErr(t, "the guest's third Dial", err, syscall.ECONNRESET)
		// A connection that the guest has closed counts until it is closed
		// here as well.
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		waitFor(t, "room for a connection", func() bool {
			_, err := p.guest.Dial(timeout(t), port)
			return err == nil
		})
	})
}

// What connections may buffer shrinks as the sum nears its bound.
func TestMemoryBound(t *testing.T) {
	p := newPair(t, vsock.Config{Buffer: 64 << 10, Memory: 1 << 20}, vsocktest.Config{})
	l, err := p.Listen(port)
	if err != nil {
		t.Fatal(err)
	}
	sum, last := 0, 0
	for range 40 {
		guest, err := p.guest.Dial(timeout(t), port)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.Accept(); err != nil {
			t.Fatal(err)
		}
		last = int(guest.Credit())
		sum += last
	}
	if last != 16<<10 {
		t.Errorf("the last connection buffers %d bytes; want the least, %d", last, 16<<10)
	}
	if bound := 1<<20 + 40*16<<10; sum > bound {
		t.Errorf("all buffer %d bytes; want at most %d", sum, bound)
	}
}

// Nothing is left of devices that have ended in any state.
func TestNoLeaks(t *testing.T) {
	rounds := func(n int) {
		for range n {
			p := newPair(t, vsock.Config{}, vsocktest.Config{})
			a, ag := p.dialGuest(t)
			b, bg := p.dialHost(t)
			a.SetDeadline(time.Now().Add(time.Hour))
			ag.Write(make([]byte, 100<<10))
			b.Close()
			bg.Close()
			p.guest.Close()
			p.wait(t)
			a.Close()

			p = newPair(t, vsock.Config{}, vsocktest.Config{})
			a, ag = p.dialGuest(t)
			ag.Mute()
			a.Close() // the guest does not confirm
			p.close()

			p = newStoppedPair(t, vsock.Config{}, vsocktest.Config{})
			p.close()
		}
	}
	rounds(1)
	before := holding(t)
	rounds(10)
	more := func() bool {
		now := holding(t)
		return now.goroutines > before.goroutines || now.descriptors > before.descriptors || now.mappings > before.mappings
	}
	for end := time.Now().Add(patience); more() && time.Now().Before(end); {
		time.Sleep(time.Millisecond) // goroutines end after what ended them
	}
	if more() {
		t.Errorf("held = %+v; want at most %+v", holding(t), before)
	}
}
