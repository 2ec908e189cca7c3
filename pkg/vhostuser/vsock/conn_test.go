package vsock_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vmrt/vmrt/pkg/vhostuser/vsock"
	"github.com/vmrt/vmrt/pkg/vhostuser/vsock/vsocktest"
)

// random returns n bytes that depend on seed.
func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	r.Read(b)
	return b
}

func TestHalfCloseByHost(t *testing.T) {
	p := newPair(t, vsock.Config{}, vsocktest.Config{})
	host, guest := p.dialGuest(t)
	if _, err := host.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	if err := host.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(guest); err != nil || string(got) != "question" {
		t.Errorf("guest reads %q, %v; want %q", got, err, "question")
	}
	_, err := host.Write([]byte("more"))
	wantErr(t, "Write after CloseWrite", err, syscall.EPIPE)
	want := random(1, 1<<20)
	go func() {
		guest.Write(want)
		guest.Close()
	}()
	if got, err := io.ReadAll(host); err != nil || !bytes.Equal(got, want) {
		t.Errorf("host reads %d bytes, %v; want the %d sent", len(got), err, len(want))
	}
}

func TestHalfCloseByGuest(t *testing.T) {
	p := newPair(t, vsock.Config{}, vsocktest.Config{})
	host, guest := p.dialHost(t)
	guest.Write([]byte("question"))
	guest.CloseWrite()
	if got, err := io.ReadAll(host); err != nil || string(got) != "question" {
		t.Errorf("host reads %q, %v; want %q", got, err, "question")
	}
	want := random(2, 1<<20)
	go func() {
		host.Write(want)
		host.Close()
	}()
	if got, err := io.ReadAll(guest); err != nil || !bytes.Equal(got, want) {
		t.Errorf("guest reads %d bytes, %v; want the %d sent", len(got), err, len(want))
	}
}

// A guest that half-closes is told apart from one that closes.
func TestPeerClosed(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(*vsocktest.Conn)
		want bool
	}{
		{"half-close", func(c *vsocktest.Conn) { c.CloseWrite() }, false},
		{"close", func(c *vsocktest.Conn) { c.Close() }, true},
		{"reset", func(c *vsocktest.Conn) { c.Reset() }, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPair(t, vsock.Config{}, vsocktest.Config{})
			host, guest := p.dialGuest(t)
			if host.PeerClosed() {
				t.Error("PeerClosed() = true; want false for an open connection")
			}
			tc.end(guest)
			io.ReadAll(host)
			if got := host.PeerClosed(); got != tc.want {
				t.Errorf("PeerClosed() = %v; want %v", got, tc.want)
			}
		})
	}
}

// After CloseRead the guest can still write as much as it likes.
func TestCloseRead(t *testing.T) {
	p := newPair(t, vsock.Config{}, vsocktest.Config{})
	host, guest := p.dialGuest(t)
	// Some of it is there already, and nobody has read it.
	if _, err := guest.Write(make([]byte, 200<<10)); err != nil {
		t.Fatal(err)
	}
	if err := host.CloseRead(); err != nil {
		t.Fatal(err)
	}
	if n, err := host.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("Read after CloseRead = %d, %v; want 0, EOF", n, err)
	}
	waitFor(t, "end of the guest's writes", func() bool {
		_, err := guest.Write(make([]byte, 64<<10))
		return errors.Is(err, syscall.EPIPE)
	})
	if _, err := host.Write([]byte("x")); err != nil {
		t.Errorf("Write after CloseRead = %v; want nil", err)
	}
}

func TestGuestStopsReading(t *testing.T) {
	p := newPair(t, vsock.Config{}, vsocktest.Config{})
	host, guest := p.dialGuest(t)
	done := make(chan error, 1)
	go func() {
		_, err := host.Write(make([]byte, 10<<20))
		done <- err
	}()
	guest.CloseRead()
	wantErr(t, "Write to a guest that does not read", <-done, syscall.EPIPE)
	guest.Write([]byte("still here"))
	guest.CloseWrite()
	if got, err := io.ReadAll(host); err != nil || string(got) != "still here" {
		t.Errorf("host reads %q, %v; want %q", got, err, "still here")
	}
}

// What the guest wrote before it closed arrives, and the end after it.
func TestGuestCloses(t *testing.T) {
	p := newPair(t, vsock.Config{}, vsocktest.Config{})
	host, guest := p.dialGuest(t)
	want := random(3, 100<<10)
	guest.Write(want)
	guest.Close()
	waitFor(t, "end of writes", func() bool {
		_, err := host.Write([]byte("x"))
		return errors.Is(err, syscall.EPIPE)
	})
	if got, err := io.ReadAll(host); err != nil || !bytes.Equal(got, want) {
		t.Errorf("host reads %d bytes, %v; want the %d sent", len(got), err, len(want))
	}
}

// A reset is told apart from an orderly end, after the data before it.
func TestGuestResets(t *testing.T) {
	p := newPair(t, vsock.Config{}, vsocktest.Config{})
	host, guest := p.dialGuest(t)
	guest.Write([]byte("cut"))
	guest.Reset()
	got, err := io.ReadAll(host)
	if string(got) != "cut" {
		t.Errorf("host reads %q; want %q", got, "cut")
	}
	wantErr(t, "Read after a reset", err, syscall.ECONNRESET)
	_, err = host.Write([]byte("x"))
	wantErr(t, "Write after a reset", err, syscall.ECONNRESET)
	if err := host.Close(); err != nil {
		t.Errorf("Close after a reset = %v; want nil", err)
	}
}

func TestClosedConn(t *testing.T) {
	p := newPair(t, vsock.Config{}, vsocktest.Config{})
	host, _ := p.dialGuest(t)
	read := make(chan error, 1)
	go func() {
		_, err := host.Read(make([]byte, 1))
		read <- err
	}()
	for range 2 {
		if err := host.Close(); err != nil {
			t.Errorf("Close() = %v; want nil", err)
		}
	}
	wantErr(t, "Read during Close", <-read, net.ErrClosed)
	_, err := host.Write([]byte("x"))
	wantErr(t, "Write after Close", err, net.ErrClosed)
	_, err = host.Write(nil)
	wantErr(t, "empty Write after Close", err, net.ErrClosed)
	wantErr(t, "CloseWrite after Close", host.CloseWrite(), net.ErrClosed)
	wantErr(t, "CloseRead after Close", host.CloseRead(), net.ErrClosed)
	wantErr(t, "SetDeadline after Close", host.SetDeadline(time.Now()), net.ErrClosed)
}

// A Write that runs into its deadline says how much of it was sent, and the
// guest gets exactly that.
func TestPartialWrite(t *testing.T) {
	p := newPair(t, vsock.Config{}, vsocktest.Config{Credit: 100_000})
	host, guest := p.dialGuest(t)
	want := random(4, 300_000)
	host.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
	n, err := host.Write(want)
	if n != 100_000 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("Write(300000 bytes) = %d, %v; want 100000, a timeout", n, err)
	}
	host.SetWriteDeadline(time.Time{})
	go func() {
		host.Write(want[n:])
		host.CloseWrite()
	}()
	if got, err := io.ReadAll(guest); err != nil || !bytes.Equal(got, want) {
		t.Errorf("guest reads %d bytes, %v; want the %d sent", len(got), err, len(want))
	}
}

// Many connections at once, in both directions, each with its own bytes in
// pieces of all sizes.
func TestManyConns(t *testing.T) {
	const conns, size = 60, 400 << 10
	p := newPair(t, vsock.Config{}, vsocktest.Config{Fragments: 3})
	gl := p.guest.Listen(port)
	hl, err := p.Listen(port)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	send := func(c net.Conn, seed uint64) {
		r := rand.New(rand.NewPCG(seed, 0))
		for b := random(seed, size); len(b) > 0; {
			n := min(len(b), 1+r.IntN(50_000))
			if _, err := c.Write(b[:n]); err != nil {
				t.Errorf("Write on %v: %v", c.LocalAddr(), err)
				return
			}
			b = b[n:]
		}
		c.(interface{ CloseWrite() error }).CloseWrite()
	}
	receive := func(c net.Conn, seed uint64) {
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, random(seed, size)) {
			t.Errorf("%v reads %d bytes, %v; want the %d sent", c.LocalAddr(), len(got), err, size)
		}
	}
	for i := range uint64(conns) {
		var host, guest net.Conn
		if i%2 == 0 {
			host, err = p.Dial(timeout(t), port)
			if err == nil {
				guest, err = gl.Accept()
			}
		} else {
			guest, err = p.guest.Dial(timeout(t), port)
			if err == nil {
				host, err = hl.Accept()
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() { send(host, 2*i) })
		wg.Go(func() { send(guest, 2*i+1) })
		wg.Go(func() { receive(guest, 2*i) })
		wg.Go(func() { receive(host, 2*i+1) })
	}
	wg.Wait()
}

// A guest that uses less than its credit, for whatever reason, does not wait
// forever for more.
func TestGuestWindow(t *testing.T) {
	for _, tc := range []struct {
		name string
		cfg  vsock.Config
		gcfg vsocktest.Config
		size int
	}{
		{"its own buffer is small", vsock.Config{}, vsocktest.Config{Credit: 10_000}, 1 << 20},
		{"the host's is large", vsock.Config{Buffer: 4 << 20, Memory: 1 << 30}, vsocktest.Config{}, 4 << 20},
		{"nobody knows", vsock.Config{}, vsocktest.Config{Window: 10_000}, 50_000},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPair(t, tc.cfg, tc.gcfg)
			host, guest := p.dialGuest(t)
			// With a wait for each of the small windows it is too short.
			host.SetDeadline(time.Now().Add(5 * time.Second))
			want := random(7, tc.size)
			go func() {
				guest.Write(want)
				guest.Close()
			}()
			if got, err := io.ReadAll(host); err != nil || !bytes.Equal(got, want) {
				t.Errorf("host reads %d bytes, %v; want the %d sent", len(got), err, len(want))
			}
		})
	}
}

// The counters of the flow control are 32 bits long and wrap.
func TestCountersWrap(t *testing.T) {
	p := newPair(t, vsock.Config{}, vsocktest.Config{})
	host, guest := p.dialGuest(t)
	const n = 1<<32 - 1_000_000
	host.Shift(n)
	guest.Shift(n)
	want := random(6, 4<<20)
	go io.Copy(guest, guest)
	sent := make(chan error, 1)
	go func() {
		_, err := host.Write(want)
		sent <- err
	}()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(host, got); err != nil || !bytes.Equal(got, want) {
		t.Errorf("echo over the wrap: error %v; want the bytes sent", err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

// A connection that sends without end leaves room for others.
func TestFairness(t *testing.T) {
	p := newPair(t, vsock.Config{}, vsocktest.Config{RxBuffers: 8})
	bulkHost, bulkGuest := p.dialGuest(t)
	host, guest := p.dialGuest(t)
	go func() {
		for b := make([]byte, 1<<20); ; {
			if _, err := bulkHost.Write(b); err != nil {
				return
			}
		}
	}()
	// It is under way before the other one starts.
	if _, err := io.ReadFull(bulkGuest, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	drained := make(chan int64, 1)
	go func() {
		n, _ := io.Copy(io.Discard, bulkGuest)
		drained <- n
	}()
	go io.Copy(guest, guest)
	host.SetDeadline(time.Now().Add(patience))
	b := make([]byte, 64)
	for range 200 {
		if _, err := host.Write(b); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(host, b); err != nil {
			t.Fatal(err)
		}
	}
	bulkHost.Close()
	if n := <-drained; n == 0 {
		t.Error("the bulk connection has sent nothing meanwhile; want some")
	}
}

// A pause of the machine is invisible to connections.
func TestPause(t *testing.T) {
	p := newPair(t, vsock.Config{}, vsocktest.Config{})
	host, guest := p.dialGuest(t)
	want := random(5, 3<<20)
	sent := make(chan error, 1)
	go func() {
		_, err := host.Write(want)
		sent <- err
		host.CloseWrite()
	}()
	back := make(chan []byte, 1)
	go func() {
		b, _ := io.ReadAll(host)
		back <- b
	}()
	go func() {
		io.Copy(guest, guest)
		guest.CloseWrite()
	}()
	for range 10 {
		if err := p.guest.Pause(); err != nil {
			t.Fatal(err)
		}
		if err := p.guest.Resume(); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-sent; err != nil {
		t.Errorf("Write during pauses = %v; want nil", err)
	}
	if got := <-back; !bytes.Equal(got, want) {
		t.Errorf("%d bytes came back; want the %d sent", len(got), len(want))
	}
}

// A reboot of the guest breaks what its driver has known, and nothing else.
func TestReboot(t *testing.T) {
	p := newPair(t, vsock.Config{}, vsocktest.Config{})
	host, _ := p.dialGuest(t)
	if err := p.guest.Reboot(); err != nil {
		t.Fatal(err)
	}
	_, err := host.Read(make([]byte, 1))
	wantErr(t, "Read after a reboot", err, syscall.ECONNRESET)
	host, guest := p.dialGuest(t)
	host.Write([]byte("again"))
	host.Close()
	if got, err := io.ReadAll(guest); err != nil || string(got) != "again" {
		t.Errorf("guest reads %q, %v; want %q", got, err, "again")
	}
}
