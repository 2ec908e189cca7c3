package vsock_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/vmrt/vmrt/pkg/vhostuser/vsock"
	"github.com/vmrt/vmrt/pkg/vhostuser/vsock/vsocktest"
)

// FuzzHeader compares the two codecs of headers, that of the device and that
// of the fake guest.
func FuzzHeader(f *testing.F) {
	h := vsocktest.Header{
		SrcCID: 3, DstCID: 2, SrcPort: 1024, DstPort: 1025, Len: 64, Type: 1, Op: 5,
		Flags: 1, BufAlloc: 256 << 10, FwdCnt: 1<<32 - 1,
	}
	f.Add(h.Append(nil))
	f.Add(make([]byte, 44))
	f.Fuzz(func(t *testing.T, data []byte) {
		var b [44]byte
		copy(b[:], data)
		got := vsock.DecodeHeader(b)
		if again := got.Encode(); again != b {
			t.Errorf("encode(decode(%x)) = %x", b, again)
		}
		other := vsocktest.DecodeHeader(b[:])
		if again := other.Append(nil); !bytes.Equal(again, b[:]) || other.Op != got.Op() {
			t.Errorf("operation of %x = %d; want %d", b, got.Op(), other.Op)
		}
	})
}

// Steps of FuzzPackets.
const (
	stepPacket = iota
	stepAccept
	stepWrite
	stepRead
	stepClose
	stepCloseWrite
	stepDial
	steps
)

const stepSize = 16

// step encodes one.
func step(kind, op, local, remote byte, flags uint16, n uint16, alloc, fwd uint32) []byte {
	b := []byte{kind, op, local, remote}
	b = binary.LittleEndian.AppendUint16(b, flags)
	b = binary.LittleEndian.AppendUint16(b, n)
	b = binary.LittleEndian.AppendUint32(b, alloc)
	return binary.LittleEndian.AppendUint32(b, fwd)
}

// FuzzPackets lets a guest send any packets on a few ports while the host uses
// what connections there are. The device must stay within its bounds and
// work to the end, which must come.
func FuzzPackets(f *testing.F) {
	const a = 64 << 10
	f.Add(bytes.Join([][]byte{
		step(stepPacket, vsocktest.OpRequest, 1, 0, 0, 0, a, 0),
		step(stepAccept, 0, 0, 0, 0, 0, 0, 0),
		step(stepPacket, vsocktest.OpRW, 1, 0, 0, 500, a, 0),
		step(stepWrite, 0, 0, 0, 0, 9000, 0, 0),
		step(stepRead, 0, 0, 0, 0, 100, 0, 0),
		step(stepPacket, vsocktest.OpCreditUpdate, 1, 0, 0, 0, a, 9000),
		step(stepPacket, vsocktest.OpShutdown, 1, 0, 2, 0, a, 9000),
		step(stepCloseWrite, 0, 0, 0, 0, 0, 0, 0),
		step(stepClose, 0, 0, 0, 0, 0, 0, 0),
		step(stepPacket, vsocktest.OpReset, 1, 0, 0, 0, 0, 0),
	}, nil))
	f.Add(bytes.Join([][]byte{
		step(stepDial, 0, 0, 3, 0, 0, 0, 0),
		step(stepPacket, vsocktest.OpResponse, 3, 8, 0, 0, 1<<32-1, 1<<32-1),
		step(stepWrite, 0, 0, 0, 0, 100, 0, 0),
		step(stepPacket, vsocktest.OpCreditRequest, 3, 8, 0, 0, 0, 5),
		step(stepPacket, vsocktest.OpShutdown, 3, 8, 3, 0, 0, 5),
	}, nil))
	f.Add(bytes.Repeat(step(stepPacket, vsocktest.OpRequest, 1, 0, 0, 0, a, 0), 3))
	f.Add(bytes.Repeat(step(stepPacket, 99, 1, 9, 0, 65000, a, 0), 300))
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg := vsock.Config{MaxConns: 6, Backlog: 3, Buffer: 20 << 10, Memory: 100 << 10, CloseTimeout: 5 * time.Millisecond}
		p := newPair(t, cfg, vsocktest.Config{Silent: true, Fragments: 2})
		l, err := p.Listen(0)
		if err != nil {
			t.Fatal(err)
		}
		var conns []*vsock.Conn
		for r := bytes.NewBuffer(data); r.Len() >= stepSize; {
			conns = runStep(t, p, l, conns, r.Next(stepSize))
			u := p.Usage()
			if u.Conns > cfg.MaxConns || u.Buffered > u.Committed || u.Chunks > 3*cfg.MaxConns || u.Senders > cfg.MaxConns {
				t.Fatalf("usage %+v", u)
			}
		}
		for _, c := range conns {
			c.Close()
		}
		l.Close()
		waitFor(t, "end of connections", func() bool { return p.Usage().Conns == 0 })
		if u := p.Usage(); u.Committed != 0 || u.Senders != 0 || u.Table != 0 {
			t.Errorf("usage at the end = %+v; want none", u)
		}
		p.Device.Close()
		if err := p.wait(t); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Serve() = %v; want %v", err, net.ErrClosed)
		}
	})
}

// runStep carries out one step and returns the connections there are then.
func runStep(t *testing.T, p *pair, l *vsock.Listener, conns []*vsock.Conn, b []byte) []*vsock.Conn {
	kind, op, local, remote := b[0]%steps, b[1], uint32(b[2]%8), uint32(b[3]%16)
	flags, n := binary.LittleEndian.Uint16(b[4:]), binary.LittleEndian.Uint16(b[6:])
	if remote >= 8 {
		remote += 49152 - 8 // where Dial calls from
	}
	now, cancel := context.WithCancel(context.Background())
	cancel()
	if kind == stepPacket {
		h := p.guest.Header(local, remote, uint16(op))
		h.Flags, h.Len = uint32(flags), uint32(n)
		h.BufAlloc, h.FwdCnt = binary.LittleEndian.Uint32(b[8:]), binary.LittleEndian.Uint32(b[12:])
		if err := p.guest.Send(h, make([]byte, n)); err != nil {
			t.Fatal(err)
		}
		return conns
	}
	switch kind {
	case stepAccept:
		if c, err := l.AcceptContext(now); err == nil {
			conns = append(conns, c)
		}
		return conns
	case stepDial:
		soon, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		if c, err := p.Dial(soon, local); err == nil {
			conns = append(conns, c)
		}
		return conns
	}
	if len(conns) == 0 {
		return conns
	}
	c := conns[int(local)%len(conns)]
	c.SetDeadline(time.Now().Add(time.Millisecond))
	switch kind {
	case stepWrite:
		c.Write(make([]byte, n))
	case stepRead:
		c.Read(make([]byte, n))
	case stepCloseWrite:
		c.CloseWrite()
	case stepClose:
		c.Close()
	}
	return conns
}
