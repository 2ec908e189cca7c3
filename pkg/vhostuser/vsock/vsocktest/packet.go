package vsocktest

import (
	"encoding/binary"
	"syscall"

	"github.com/vmrt/vmrt/pkg/vhostuser/vhosttest"
)

// Packet operations (virtio 1.2, section 5.10.6).
const (
	OpRequest       = 1
	OpResponse      = 2
	OpReset         = 3
	OpShutdown      = 4
	OpRW            = 5
	OpCreditUpdate  = 6
	OpCreditRequest = 7
)

// TypeStream is the type of stream sockets.
const TypeStream = 1

const (
	shutReceive = 1
	shutSend    = 2
	shutBoth    = shutReceive | shutSend
)

// Header is struct virtio_vsock_hdr.
type Header struct {
	SrcCID, DstCID   uint64
	SrcPort, DstPort uint32
	Len              uint32
	Type, Op         uint16
	Flags            uint32
	BufAlloc, FwdCnt uint32
}

// Append encodes h.
func (h *Header) Append(b []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint64(b, h.SrcCID)
	b = le.AppendUint64(b, h.DstCID)
	b = le.AppendUint32(b, h.SrcPort)
	b = le.AppendUint32(b, h.DstPort)
	b = le.AppendUint32(b, h.Len)
	b = le.AppendUint16(b, h.Type)
	b = le.AppendUint16(b, h.Op)
	b = le.AppendUint32(b, h.Flags)
	b = le.AppendUint32(b, h.BufAlloc)
	return le.AppendUint32(b, h.FwdCnt)
}

// DecodeHeader decodes the first 44 bytes of b.
func DecodeHeader(b []byte) Header {
	le := binary.LittleEndian
	return Header{
		SrcCID: le.Uint64(b), DstCID: le.Uint64(b[8:]),
		SrcPort: le.Uint32(b[16:]), DstPort: le.Uint32(b[20:]),
		Len:  le.Uint32(b[24:]),
		Type: le.Uint16(b[28:]), Op: le.Uint16(b[30:]),
		Flags:    le.Uint32(b[32:]),
		BufAlloc: le.Uint32(b[36:]), FwdCnt: le.Uint32(b[40:]),
	}
}

// addRx gives the device room for one packet.
func (g *Guest) addRx(b vhosttest.Buffer) {
	if head, ok := g.rx.Add(b); ok {
		g.rxBufs[head] = b
	}
}

// reclaim frees the slots of packets that the device has taken.
func (g *Guest) reclaim() {
	for {
		head, _, ok := g.txq.Take()
		if !ok {
			if g.txq.WantCall() {
				continue
			}
			return
		}
		for i := range g.tx {
			if s := &g.tx[i]; s.busy && s.head == head {
				s.busy = false
			}
		}
		g.txFree.Signal()
	}
}

// transmit sends one packet, with the mutex held. It waits for room.
func (g *Guest) transmit(h Header, payload []byte) error {
	h.Len = uint32(len(payload))
	var b [headerSize]byte
	return g.transmitRaw(h.Append(b[:0]), payload)
}

func (g *Guest) transmitRaw(header, payload []byte) error {
	s, err := g.slot()
	if err != nil {
		return err
	}
	copy(s.mem, header)
	copy(s.mem[headerSize:], payload)
	bufs := []vhosttest.Buffer{{Addr: s.addr, Len: uint32(len(header))}}
	for i, at := 0, uint64(headerSize); len(payload) > 0; i++ {
		n := uint32((len(payload) + g.cfg.Fragments - i - 1) / (g.cfg.Fragments - i))
		bufs = append(bufs, vhosttest.Buffer{Addr: s.addr + at, Len: n})
		at += uint64(n)
		payload = payload[n:]
	}
	var ok bool
	if g.cfg.Indirect {
		s.head, ok = g.txq.AddIndirect(s.table, bufs...)
	} else {
		s.head, ok = g.txq.Add(bufs...)
	}
	if !ok {
		panic("vsocktest: a free slot without descriptors")
	}
	s.busy = true
	g.txq.Kick()
	return nil
}

// slot waits for room for one packet.
func (g *Guest) slot() (*txSlot, error) {
	for {
		if g.closed {
			return nil, syscall.ENODEV
		}
		for i := range g.tx {
			if !g.tx[i].busy {
				return &g.tx[i], nil
			}
		}
		g.txFree.Wait()
	}
}

// Send sends a packet of any content, as a driver that knows nothing of
// connections.
func (g *Guest) Send(h Header, payload []byte) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.transmit(h, payload)
}

// SendRaw sends a packet that is b, of at most the length of a header.
func (g *Guest) SendRaw(b []byte) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.transmitRaw(b, nil)
}

// Header returns the header of a packet from one of the guest's ports to one
// of the host's.
func (g *Guest) Header(local, remote uint32, op uint16) Header {
	return Header{
		SrcCID: g.cid, DstCID: hostCID, SrcPort: local, DstPort: remote,
		Type: TypeStream, Op: op, BufAlloc: g.cfg.Credit,
	}
}

// receive takes the device's packets and gives their buffers back.
func (g *Guest) receive() {
	for {
		head, n, ok := g.rx.Take()
		if !ok {
			if g.rx.WantCall() {
				continue
			}
			g.rx.Kick()
			return
		}
		b := g.rxBufs[head]
		delete(g.rxBufs, head)
		p := g.machine.Memory()[b.Addr:][:n]
		h := DecodeHeader(p)
		g.handle(&h, p[headerSize:])
		g.addRx(b)
	}
}

// handle takes one packet. What it sends in answer needs room in the other
// queue, for which it waits.
func (g *Guest) handle(h *Header, payload []byte) {
	if g.cfg.Packets != nil {
		g.cfg.Packets(*h)
	}
	c := g.conns[connID{local: h.DstPort, remote: h.SrcPort}]
	if c != nil {
		c.handle(h, payload)
		return
	}
	if h.Op == OpRequest {
		if l := g.listeners[h.DstPort]; l != nil {
			l.add(h)
			return
		}
	}
	if h.Op != OpReset && !g.cfg.Silent {
		_ = g.transmit(g.Header(h.DstPort, h.SrcPort, OpReset), nil)
	}
}
