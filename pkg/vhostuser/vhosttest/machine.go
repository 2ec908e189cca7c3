// Package vhosttest is the other side of package vhostuser, for tests: a
// machine without a processor. It has guest memory that is shared, a front
// end that speaks vhost-user as QEMU does, and a driver's split virtqueues.
//
// A Machine's methods are for one goroutine, and each Queue's for one.
package vhosttest

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// Feature bits that tests name.
const (
	FeatureIndirect         = 1 << 28
	FeatureEventIdx         = 1 << 29
	FeatureProtocolFeatures = 1 << 30
	FeatureVersion1         = 1 << 32
)

// The guest's memory has a hole, as a PC's has, and therefore two regions. A
// guest address is also an offset into the memfd.
const (
	lowEnd    = 0xa0000
	highStart = 0xc0000
	userBase  = 0x7f5500000000
)

// timeout bounds every wait for the back end.
const timeout = 10 * time.Second

// Machine is the front end of one back end, with its guest's memory.
type Machine struct {
	// Features are what the guest's driver chooses among those offered.
	Features uint64

	conn   *net.UnixConn
	memfd  int
	mem    []byte
	next   uint64 // allocator
	queues []*Queue
	// offered is the back end's answer to GET_FEATURES.
	offered uint64
}

// New makes a machine with size bytes of memory, a multiple of 1 MiB, whose
// front end uses conn.
func New(conn *net.UnixConn, size int) (*Machine, error) {
	fd, err := unix.MemfdCreate("vhosttest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("memfd: %w", err)
	}
	m := &Machine{
		Features: FeatureVersion1 | FeatureEventIdx | FeatureProtocolFeatures,
		conn:     conn, memfd: fd, next: highStart,
	}
	if err := m.mapMemory(size); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return m, nil
}

func (m *Machine) mapMemory(size int) error {
	if err := unix.Ftruncate(m.memfd, int64(size)); err != nil {
		return fmt.Errorf("memfd: %w", err)
	}
	const seals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL
	if _, err := unix.FcntlInt(uintptr(m.memfd), unix.F_ADD_SEALS, seals); err != nil {
		return fmt.Errorf("memfd: %w", err)
	}
	var err error
	if m.mem, err = unix.Mmap(m.memfd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	return nil
}

// Disconnect ends the machine as the end of QEMU would: the back end sees the
// socket close. Waits for interrupts end. Memory remains until Close.
func (m *Machine) Disconnect() {
	m.conn.Close()
	for _, q := range m.queues {
		q.close()
	}
	m.queues = nil
}

// Close is Disconnect that also frees the guest's memory.
func (m *Machine) Close() {
	m.Disconnect()
	if m.mem != nil {
		_ = unix.Munmap(m.mem)
		unix.Close(m.memfd)
		m.mem = nil
	}
}

// Alloc returns n bytes of guest memory, aligned for any use, and their
// address. They are never freed.
func (m *Machine) Alloc(n int) (addr uint64, mem []byte) {
	addr = m.next
	m.next = (m.next + uint64(n) + 63) &^ 63
	if m.next > uint64(len(m.mem)) {
		panic("vhosttest: guest memory exhausted")
	}
	return addr, m.mem[addr:][:n:n]
}

// Memory returns the guest's memory by guest address.
func (m *Machine) Memory() []byte { return m.mem }

// Message types.
const (
	GetFeatures         = 1
	SetFeatures         = 2
	SetOwner            = 3
	ResetOwner          = 4
	SetMemTable         = 5
	SetVringNum         = 8
	SetVringAddr        = 9
	SetVringBase        = 10
	GetVringBase        = 11
	SetVringKick        = 12
	SetVringCall        = 13
	SetVringErr         = 14
	GetProtocolFeatures = 15
	SetProtocolFeatures = 16
	GetQueueNum         = 17
	SetVringEnable      = 18
	GetConfig           = 24
	SetConfig           = 25
	ResetDevice         = 34
)

// NeedReply is the message flag that asks for an acknowledgement.
const NeedReply = 8

const version = 1

// Send sends one message with descriptors.
func (m *Machine) Send(request, flags uint32, payload []byte, fds ...int) error {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, request)
	b = le.AppendUint32(b, flags|version)
	b = le.AppendUint32(b, uint32(len(payload)))
	b = append(b, payload...)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	m.conn.SetDeadline(time.Now().Add(timeout))
	if _, _, err := m.conn.WriteMsgUnix(b, oob, nil); err != nil {
		return fmt.Errorf("send request %d: %w", request, err)
	}
	return nil
}

// Receive returns the payload of the answer to a request.
func (m *Machine) Receive(request uint32) ([]byte, error) {
	var h [12]byte
	m.conn.SetDeadline(time.Now().Add(timeout))
	if _, err := io.ReadFull(m.conn, h[:]); err != nil {
		return nil, fmt.Errorf("answer to request %d: %w", request, err)
	}
	le := binary.LittleEndian
	if req, flags := le.Uint32(h[:]), le.Uint32(h[4:]); req != request || flags != version|4 {
		return nil, fmt.Errorf("answer to request %d: request %d, flags %#x", request, req, flags)
	}
	payload := make([]byte, le.Uint32(h[8:]))
	if _, err := io.ReadFull(m.conn, payload); err != nil {
		return nil, fmt.Errorf("answer to request %d: %w", request, err)
	}
	return payload, nil
}

// Get sends a request without payload whose answer is a number.
func (m *Machine) Get(request uint32) (uint64, error) {
	if err := m.Send(request, 0, nil); err != nil {
		return 0, err
	}
	return m.number(request)
}

// Acked sends a request that wants to be acknowledged, and returns the answer:
// 0 is success.
func (m *Machine) Acked(request uint32, payload []byte, fds ...int) (uint64, error) {
	if err := m.Send(request, NeedReply, payload, fds...); err != nil {
		return 0, err
	}
	return m.number(request)
}

func (m *Machine) number(request uint32) (uint64, error) {
	b, err := m.Receive(request)
	if err != nil {
		return 0, err
	}
	if len(b) != 8 {
		return 0, fmt.Errorf("answer to request %d: %d bytes", request, len(b))
	}
	return binary.LittleEndian.Uint64(b), nil
}

// U64 encodes a number as a payload.
func U64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

// State encodes a payload of a queue and a number.
func State(index, num uint32) []byte { return U64(uint64(num)<<32 | uint64(index)) }
