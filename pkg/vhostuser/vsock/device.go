// Package vsock is a virtio-vsock device (virtio 1.2, section 5.10) served
// over vhost-user: stream connections between this process, which is the
// guest's host (CID 2), and one guest.
//
// Connections implement net.Conn with half-close. Flow control is by credit in
// both directions: what a guest may send and nobody has read yet is bounded
// for each connection (Config.Buffer) and in sum (Config.Memory), and
// nothing is buffered in the direction of the guest, because Write copies
// straight into guest memory and waits for room there. Connections that wait
// for room take turns, packet by packet.
//
// # Concurrency
//
// Everything may be called from any goroutine. One mutex, Device.mu, guards
// the queues, all connections and all listeners; it is held while bytes are
// copied and never while anything waits. The device has no goroutine of its
// own besides those of vhostuser.Backend, and timers.
//
// # Not guaranteed
//
// The guest is untrusted: it can break its own connections and refuse to read
// or to answer. Seqpacket sockets are not offered. The device cannot be moved
// to another host.
package vsock

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/vmrt/vmrt/pkg/vhostuser"
)

// HostCID is the context id of this side (VMADDR_CID_HOST).
const HostCID = 2

// Config describes a Device.
type Config struct {
	// GuestCID is the guest's context id, at least 3 and not 2^32-1.
	GuestCID uint32
	// MaxConns bounds the connections that exist at one time, in any state.
	// 0: 1024.
	MaxConns int
	// Buffer is the number of bytes that the guest may send on a connection
	// ahead of its reader. 0: 256 KiB, of which Linux uses no more unless a
	// program asks for it.
	Buffer int
	// Memory bounds the sum of all connections' buffers: as it runs out, new
	// connections get smaller ones, but not below 16 KiB. 0: 32 MiB.
	Memory int
	// Backlog bounds each listener's connections that wait for Accept. 0: 128.
	Backlog int
	// CloseTimeout is how long a closed connection waits for the guest to
	// confirm that it has gone. 0: 8 s, as in Linux.
	CloseTimeout time.Duration
}

const minBuffer = 16 << 10

func (c *Config) setDefaults() {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&c.MaxConns, 1024)
	def(&c.Buffer, 256<<10)
	def(&c.Memory, 32<<20)
	def(&c.Backlog, 128)
	if c.CloseTimeout <= 0 {
		c.CloseTimeout = 8 * time.Second
	}
	c.Buffer = max(min(c.Buffer, 1<<30), minBuffer)
}

// Queues of the device. The third one, for events, is the front end's own.
const (
	rxQueue = 0 // towards the guest
	txQueue = 1 // from the guest
	queues  = 2
)

// errHungUp ends a Device whose virtual machine has ended.
var errHungUp = errors.New("the virtual machine monitor has hung up")

// Device is the vsock device of one guest.
type Device struct {
	cfg     Config
	config  [8]byte
	backend *vhostuser.Backend
	rx, tx  *vhostuser.Queue

	mu        sync.Mutex // guards the queues and everything below
	conns     map[connID]*Conn
	listeners map[uint32]*Listener
	// count is the number of connections that have not been released, and
	// committed the sum of their buffers' limits.
	count, committed int
	nextPort         uint32
	senders          senders
	replies          replies
	// stalled says that there are buffers of the guest left because the
	// guest takes no replies.
	stalled bool
	// woken are connections whose waiters are to be woken by unlock.
	woken []*Conn
	// creditTimer calls advertise if creditArmed.
	creditTimer      *time.Timer
	creditArmed      bool
	pool             pool
	rxChain, txChain vhostuser.Chain
	// err says why the device has ended.
	err error
}

// connID names a connection: all of them are between the same two hosts.
type connID struct{ local, remote uint32 }

// New returns a device that waits for Serve. Dial and Listen may be called
// already.
func New(cfg Config) (*Device, error) {
	if cfg.GuestCID <= HostCID || cfg.GuestCID == 1<<32-1 {
		return nil, fmt.Errorf("vsock device: CID %d is reserved", cfg.GuestCID)
	}
	cfg.setDefaults()
	d := &Device{
		cfg:       cfg,
		conns:     make(map[connID]*Conn),
		listeners: make(map[uint32]*Listener),
		nextPort:  firstEphemeral,
	}
	// struct virtio_vsock_config
	binary.LittleEndian.PutUint64(d.config[:], uint64(cfg.GuestCID))
	d.backend = vhostuser.NewBackend(device{d}, queues, &d.mu)
	d.rx, d.tx = d.backend.Queue(rxQueue), d.backend.Queue(txQueue)
	return d, nil
}

// Serve makes the device available to the front end at the other end of conn,
// which it closes. It returns when the front end has hung up (nil), after
// Close (net.ErrClosed), when ctx ends, or when front end or driver break
// their protocols. The device has then ended for good, as after Close. To be
// called once.
func (d *Device) Serve(ctx context.Context, conn *net.UnixConn) error {
	err := d.backend.Serve(ctx, conn)
	if err == nil {
		d.end(errHungUp)
	} else {
		d.end(err)
	}
	return err
}

// Close ends the device: connections break, waits end, and Serve returns soon.
// Idempotent.
func (d *Device) Close() error {
	d.end(net.ErrClosed)
	return nil
}

// end breaks everything. The first error is what later calls return.
func (d *Device) end(err error) {
	d.mu.Lock()
	defer d.unlock()
	if d.err != nil {
		return
	}
	d.err = err
	d.backend.Stop(err)
	for _, c := range d.conns {
		c.detach(syscall.ECONNRESET)
	}
	for _, l := range d.listeners {
		l.end(err)
	}
	d.replies.clear()
	if d.creditTimer != nil {
		d.creditTimer.Stop()
	}
}

// unlock wakes who waits for a change made since lock. All of them need the
// mutex, so they are woken at the end.
func (d *Device) unlock() {
	for i, c := range d.woken {
		c.woken = false
		c.readable.Broadcast()
		c.writable.Broadcast()
		d.woken[i] = nil
	}
	d.woken = d.woken[:0]
	d.mu.Unlock()
}

// locker is a Device's mutex for those who wait with it: they, too, leave by
// unlock.
type locker Device

func (l *locker) Lock()   { l.mu.Lock() }
func (l *locker) Unlock() { (*Device)(l).unlock() }

// device is what the Backend sees of a Device.
type device struct{ d *Device }

// Features implements vhostuser.Device. There are no stream-only feature bits.
func (device) Features() uint64 { return 0 }

// Config implements vhostuser.Device.
func (v device) Config() []byte { return v.d.config[:] }

// Kicked implements vhostuser.Device.
func (v device) Kicked(queue int) (more bool) {
	d := v.d
	d.mu.Lock()
	defer d.unlock()
	if queue == rxQueue {
		d.flush()
		if !d.stalled || d.replies.full() {
			return false
		}
		// There is room for replies again.
	}
	return d.receive()
}

// Reset implements vhostuser.Device: the guest has rebooted. Connections that
// its driver has never heard of remain.
func (v device) Reset() {
	d := v.d
	d.mu.Lock()
	defer d.unlock()
	for _, c := range d.conns {
		if c.state != connecting || c.pending&pendRequest == 0 {
			c.detach(syscall.ECONNRESET)
		}
	}
	d.replies.clear()
}
