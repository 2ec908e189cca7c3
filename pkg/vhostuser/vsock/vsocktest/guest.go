// Package vsocktest is a guest without a virtual machine, for tests of the
// host's side of vsock: a virtio-vsock driver in this process, on real
// virtqueues in shared memory, behind a front end that speaks vhost-user.
//
// It behaves as Linux does where that can be seen from outside: its buffers of
// 4 KiB for packets, its packets of at most 64 KiB, when it updates credit and
// how it closes. Everything may be used from any goroutine.
package vsocktest

import (
	"encoding/binary"
	"fmt"
	"net"
	"sync"
	"syscall"

	"github.com/vmrt/vmrt/pkg/vhostuser/vhosttest"
)

const (
	rxQueue = 0
	txQueue = 1

	queueSize  = 128
	rxBuffer   = 4096
	maxPayload = 64 << 10
	headerSize = 44
	memorySize = 32 << 20

	hostCID = 2
)

// Config describes a Guest.
type Config struct {
	// Credit is the number of bytes that the host may send on a connection
	// ahead of its reader. 0: 256 KiB.
	Credit uint32
	// Window, if set, is how far ahead of the host's reader the guest goes,
	// without a word about it. It never goes further than Credit, as Linux.
	Window uint32
	// RxBuffers is the number of packets that the driver has room for. 0: all
	// that fit into the queue. Negative: none, until AddRxBuffers.
	RxBuffers int
	// Fragments is the number of descriptors that carry the payload of a
	// packet. 0: one.
	Fragments int
	// Indirect puts them into a table of their own.
	Indirect bool
	// Silent does not answer packets that belong to no connection.
	Silent bool
	// Packets, if set, sees the header of each packet that arrives. It is
	// called with the Guest's mutex held.
	Packets func(Header)
	// WithoutEventIdx is a driver that has not heard of the event index.
	WithoutEventIdx bool
}

// Guest is a running guest.
type Guest struct {
	cfg     Config
	machine *vhosttest.Machine
	cid     uint64
	readers sync.WaitGroup

	mu        sync.Mutex // guards the queues and everything below
	rx, txq   *vhosttest.Queue
	rxBufs    map[uint16]vhosttest.Buffer
	tx        []txSlot
	txFree    sync.Cond // a slot is no longer busy
	conns     map[connID]*Conn
	listeners map[uint32]*Listener
	nextPort  uint32
	closed    bool
}

type connID struct{ local, remote uint32 }

// txSlot is room for one packet.
type txSlot struct {
	busy        bool
	head        uint16
	addr, table uint64
	mem         []byte
}

// New connects a guest to the back end at the other end of conn, and starts
// its driver.
func New(conn *net.UnixConn, cfg Config) (*Guest, error) {
	g, err := NewStopped(conn, cfg)
	if err != nil {
		return nil, err
	}
	if err := g.Boot(); err != nil {
		g.Close()
		return nil, err
	}
	return g, nil
}

// NewStopped is New without the driver: call Boot.
func NewStopped(conn *net.UnixConn, cfg Config) (*Guest, error) {
	if cfg.Credit == 0 {
		cfg.Credit = 256 << 10
	}
	if cfg.Window == 0 {
		cfg.Window = cfg.Credit
	}
	if cfg.RxBuffers == 0 {
		cfg.RxBuffers = queueSize
	}
	cfg.Fragments = max(cfg.Fragments, 1)
	m, err := vhosttest.New(conn, memorySize)
	if err != nil {
		return nil, err
	}
	g := &Guest{
		cfg: cfg, machine: m,
		rxBufs:    make(map[uint16]vhosttest.Buffer),
		conns:     make(map[connID]*Conn),
		listeners: make(map[uint32]*Listener),
		nextPort:  1 << 20,
	}
	g.txFree.L = &g.mu
	if cfg.Indirect {
		m.Features |= vhosttest.FeatureIndirect
	}
	if cfg.WithoutEventIdx {
		m.Features &^= vhosttest.FeatureEventIdx
	}
	config, err := m.Connect(2, queueSize, 8)
	if err != nil {
		m.Close()
		return nil, err
	}
	if len(config) != 8 {
		m.Close()
		return nil, fmt.Errorf("configuration of %d bytes: want 8", len(config))
	}
	g.cid = binary.LittleEndian.Uint64(config)
	return g, nil
}

// CID returns the guest's context id, as the device has told it.
func (g *Guest) CID() uint64 { return g.cid }

// Boot starts the driver.
func (g *Guest) Boot() error {
	g.mu.Lock()
	g.rx, g.txq = g.machine.Queue(rxQueue), g.machine.Queue(txQueue)
	for range g.cfg.RxBuffers {
		g.allocRx(rxBuffer)
	}
	g.allocTx()
	g.txq.WantCall()
	g.rx.WantCall()
	g.mu.Unlock()
	if err := g.machine.Start(); err != nil {
		return err
	}
	rx, tx := g.rx, g.txq
	g.readers.Go(func() { g.interrupts(rx, g.receive) })
	g.readers.Go(func() { g.interrupts(tx, g.reclaim) })
	return nil
}

// AddRxBuffers gives the driver room for n more packets.
func (g *Guest) AddRxBuffers(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for range n {
		g.allocRx(rxBuffer)
	}
	g.rx.Kick()
}

// AddRxBuffer gives the driver room for one more packet of n bytes at most.
func (g *Guest) AddRxBuffer(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.allocRx(n)
	g.rx.Kick()
}

// Break makes one of the queues invalid and kicks it.
func (g *Guest) Break(queue int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	q := g.machine.Queue(queue)
	q.SetAvailIndex(0x8000)
	q.ForceKick()
}

func (g *Guest) allocRx(n int) {
	addr, _ := g.machine.Alloc(n)
	g.addRx(vhosttest.Buffer{Addr: addr, Len: uint32(n), Write: true})
}

// Pause stops the machine, and Resume lets it go on. The driver notices
// nothing.
func (g *Guest) Pause() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.machine.Stop()
}

// Resume ends a Pause.
func (g *Guest) Resume() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.machine.Start()
}

// Reboot starts the driver again, which has forgotten everything.
func (g *Guest) Reboot() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.machine.Stop(); err != nil {
		return err
	}
	g.machine.Reboot()
	for _, c := range g.conns {
		c.detach(syscall.ECONNRESET)
	}
	old := g.rxBufs
	g.rxBufs = make(map[uint16]vhosttest.Buffer)
	for _, b := range old {
		g.addRx(b)
	}
	for i := range g.tx {
		g.tx[i].busy = false
	}
	g.rx.WantCall()
	g.txq.WantCall()
	return g.machine.Start()
}

// Close ends the guest as the end of its machine would.
func (g *Guest) Close() error {
	g.mu.Lock()
	if !g.closed {
		g.closed = true
		for _, c := range g.conns {
			c.detach(syscall.ECONNRESET)
		}
		for _, l := range g.listeners {
			l.end()
		}
		g.txFree.Broadcast()
	}
	g.mu.Unlock()
	g.machine.Disconnect()
	g.readers.Wait()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.machine.Close()
	return nil
}

// interrupts calls handle, with the mutex held, for each of a queue's.
func (g *Guest) interrupts(q *vhosttest.Queue, handle func()) {
	for {
		g.mu.Lock()
		closed := g.closed
		if !closed {
			handle()
		}
		g.mu.Unlock()
		if closed || q.WaitCall(0) != nil {
			return
		}
	}
}

// allocTx lays out as many packets as the queue has descriptors for, within
// reason.
func (g *Guest) allocTx() {
	n := queueSize / (1 + g.cfg.Fragments)
	if g.cfg.Indirect {
		n = queueSize
	}
	for range min(n, 64) {
		s := txSlot{}
		s.addr, s.mem = g.machine.Alloc(headerSize + maxPayload)
		s.table, _ = g.machine.Alloc(16 * (1 + g.cfg.Fragments))
		g.tx = append(g.tx, s)
	}
}
