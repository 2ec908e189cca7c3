package vsock_test

import (
	"io"
	"sync"
	"testing"

	"github.com/vmrt/vmrt/pkg/vhostuser/vsock"
	"github.com/vmrt/vmrt/pkg/vhostuser/vsock/vsocktest"
)

// The benchmarks measure the device with the fake guest's driver, which shares
// the time: they are for comparison with each other.

func BenchmarkRoundTrip(b *testing.B) {
	p := newPair(b, vsock.Config{}, vsocktest.Config{})
	host, guest := p.dialGuest(b)
	go io.Copy(guest, guest)
	b.ReportAllocs()
	msg := make([]byte, 64)
	for b.Loop() {
		if _, err := host.Write(msg); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(host, msg); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkToGuest(b *testing.B) {
	p := newPair(b, vsock.Config{}, vsocktest.Config{})
	host, guest := p.dialGuest(b)
	go io.Copy(io.Discard, guest)
	buf := make([]byte, 64<<10)
	b.SetBytes(int64(len(buf)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := host.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkFromGuest(b *testing.B) {
	for _, gcfg := range []struct {
		name string
		vsocktest.Config
	}{
		{"direct", vsocktest.Config{}},
		{"16fragments", vsocktest.Config{Fragments: 16}},
		{"16fragments-indirect", vsocktest.Config{Fragments: 16, Indirect: true}},
	} {
		b.Run(gcfg.name, func(b *testing.B) {
			p := newPair(b, vsock.Config{}, gcfg.Config)
			host, guest := p.dialGuest(b)
			go func() {
				for buf := make([]byte, 64<<10); ; {
					if _, err := guest.Write(buf); err != nil {
						return
					}
				}
			}()
			buf := make([]byte, 64<<10)
			b.SetBytes(int64(len(buf)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := io.ReadFull(host, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkConns writes on many connections at once.
func BenchmarkConns(b *testing.B) {
	const conns = 50
	p := newPair(b, vsock.Config{}, vsocktest.Config{})
	buf := make([]byte, 4<<10)
	hosts := make([]*vsock.Conn, conns)
	for i := range hosts {
		host, guest := p.dialGuest(b)
		hosts[i] = host
		go io.Copy(io.Discard, guest)
	}
	b.SetBytes(conns * int64(len(buf)))
	b.ReportAllocs()
	for b.Loop() {
		var wg sync.WaitGroup
		for _, host := range hosts {
			wg.Go(func() {
				if _, err := host.Write(buf); err != nil {
					b.Error(err)
				}
			})
		}
		wg.Wait()
	}
}

// BenchmarkDial measures a connection from its request to its confirmed end.
func BenchmarkDial(b *testing.B) {
	p := newPair(b, vsock.Config{}, vsocktest.Config{})
	l := p.guest.Listen(port)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	b.ReportAllocs()
	for b.Loop() {
		c, err := p.Dial(b.Context(), port)
		if err != nil {
			b.Fatal(err)
		}
		io.Copy(io.Discard, c)
		c.Close()
	}
}
