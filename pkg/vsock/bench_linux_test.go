package vsock_test

import (
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/pkg/vsock"
	"github.com/vmrt/vmrt/pkg/vsock/internal/exchange"
)

// BenchmarkGuest measures a stream to a real guest: round trips of 64 bytes
// and bulk both ways. virtio-serial, in the same machine, is for comparison.
func BenchmarkGuest(b *testing.B) {
	path := filepath.Join(b.TempDir(), "serial")
	l, err := net.Listen("unix", path)
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	m := boot(b, guest.Tuned, vsock.Auto,
		"-chardev", "socket,id=bench,path="+path,
		"-device", "virtio-serial-device", "-device", "virtserialport,chardev=bench,name=bench")
	serial, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	defer serial.Close()
	serial.SetDeadline(time.Now().Add(10 * time.Minute))
	stream := m.dial(b, exchange.Port)
	stream.SetDeadline(time.Now().Add(10 * time.Minute))
	for _, tr := range []struct {
		name string
		conn net.Conn
	}{{m.Name(), stream}, {"virtio-serial", serial}} {
		b.Run("RoundTrip/"+tr.name, func(b *testing.B) { benchRoundTrip(b, tr.conn) })
		b.Run("ToGuest/"+tr.name, func(b *testing.B) { benchToGuest(b, tr.conn) })
		b.Run("FromGuest/"+tr.name, func(b *testing.B) { benchFromGuest(b, tr.conn) })
	}
}

// bulk is the size of one transfer.
const bulk = 8 << 20

func benchRoundTrip(b *testing.B, c net.Conn) {
	msg := make([]byte, 64)
	// One request for all round trips: its head is no part of them.
	const trips = 500
	var times []time.Duration
	for b.Loop() {
		if err := exchange.Request(c, exchange.Echo, uint64(trips*len(msg))); err != nil {
			b.Fatal(err)
		}
		for range trips {
			begin := time.Now()
			if _, err := c.Write(msg); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(c, msg); err != nil {
				b.Fatal(err)
			}
			times = append(times, time.Since(begin))
		}
	}
	slices.Sort(times)
	b.ReportMetric(0, "ns/op") // of 500 round trips
	for _, p := range []int{10, 50, 99} {
		b.ReportMetric(float64(times[len(times)*p/100].Microseconds()), fmt.Sprintf("us-p%d", p))
	}
}

func benchToGuest(b *testing.B, c net.Conn) {
	b.SetBytes(bulk)
	b.ReportAllocs()
	buf := make([]byte, 256<<10)
	for b.Loop() {
		if err := exchange.Request(c, exchange.Sink, bulk); err != nil {
			b.Fatal(err)
		}
		for range bulk / len(buf) {
			if _, err := c.Write(buf); err != nil {
				b.Fatal(err)
			}
		}
		if _, err := io.ReadFull(c, buf[:1]); err != nil {
			b.Fatal(err)
		}
	}
}

func benchFromGuest(b *testing.B, c net.Conn) {
	b.SetBytes(bulk)
	b.ReportAllocs()
	buf := make([]byte, 256<<10)
	for b.Loop() {
		if err := exchange.Request(c, exchange.Give, bulk); err != nil {
			b.Fatal(err)
		}
		for range bulk / len(buf) {
			if _, err := io.ReadFull(c, buf); err != nil {
				b.Fatal(err)
			}
		}
	}
}
