package vhosttest

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// Connect introduces the front end, as QEMU does when its device is made, and
// returns the configuration space's first n bytes. The machine gets queues
// with the given number of descriptors.
func (m *Machine) Connect(queues, size, n int) (config []byte, err error) {
	if m.offered, err = m.Get(GetFeatures); err != nil {
		return nil, err
	}
	protocol, err := m.Get(GetProtocolFeatures)
	if err != nil {
		return nil, err
	}
	if err := m.Send(SetProtocolFeatures, 0, U64(protocol)); err != nil {
		return nil, err
	}
	have, err := m.Get(GetQueueNum)
	if err != nil {
		return nil, err
	}
	if have < uint64(queues) {
		return nil, fmt.Errorf("back end has %d queues: want %d", have, queues)
	}
	if err := m.Send(SetOwner, 0, nil); err != nil {
		return nil, err
	}
	for i := range queues {
		q, err := m.newQueue(i, size)
		if err != nil {
			return nil, err
		}
		m.queues = append(m.queues, q)
		if err := m.Send(SetVringErr, 0, U64(uint64(i)), q.errFD); err != nil {
			return nil, err
		}
	}
	return m.Config(0, n)
}

// Config asks for n bytes of the configuration space.
func (m *Machine) Config(offset, n int) ([]byte, error) {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, uint32(offset))
	b = le.AppendUint32(b, uint32(n))
	b = append(b, make([]byte, 4+n)...)
	if err := m.Send(GetConfig, 0, b); err != nil {
		return nil, err
	}
	answer, err := m.Receive(GetConfig)
	if err != nil {
		return nil, err
	}
	if len(answer) < 12 {
		return nil, fmt.Errorf("configuration: %d bytes", len(answer))
	}
	return answer[12:], nil
}

// Queue returns queue i.
func (m *Machine) Queue(i int) *Queue { return m.queues[i] }

// MemTable encodes the machine's memory regions.
func (m *Machine) MemTable() []byte {
	b := U64(2)
	for _, r := range [][2]uint64{{0, lowEnd}, {highStart, uint64(len(m.mem)) - highStart}} {
		for _, v := range []uint64{r[0], r[1], userBase + r[0], r[0]} {
			b = binary.LittleEndian.AppendUint64(b, v)
		}
	}
	return b
}

// MemFDs returns the descriptors that go with MemTable.
func (m *Machine) MemFDs() []int { return []int{m.memfd, m.memfd} }

// Start hands the queues over, as QEMU does when the driver is ready or the
// machine goes on. Each continues where Stop left it.
func (m *Machine) Start() error {
	features := m.Features & m.offered
	if err := m.Send(SetFeatures, 0, U64(features)); err != nil {
		return err
	}
	if rc, err := m.Acked(SetMemTable, m.MemTable(), m.MemFDs()...); err != nil || rc != 0 {
		return fmt.Errorf("SET_MEM_TABLE: answer %d, error %v", rc, err)
	}
	for _, q := range m.queues {
		q.eventIdx = features&FeatureEventIdx != 0
		if err := q.handOver(); err != nil {
			return err
		}
	}
	for i := range m.queues {
		if rc, err := m.Acked(SetVringEnable, State(uint32(i), 1)); err != nil || rc != 0 {
			return fmt.Errorf("SET_VRING_ENABLE %d: answer %d, error %v", i, rc, err)
		}
	}
	return nil
}

// Stop takes the queues back, as QEMU does when the machine pauses.
func (m *Machine) Stop() error {
	for i := range m.queues {
		if err := m.Send(SetVringEnable, 0, State(uint32(i), 0)); err != nil {
			return err
		}
	}
	for i, q := range m.queues {
		if err := m.Send(GetVringBase, 0, State(uint32(i), 0)); err != nil {
			return err
		}
		b, err := m.Receive(GetVringBase)
		if err != nil {
			return err
		}
		if len(b) != 8 || binary.LittleEndian.Uint32(b) != uint32(i) {
			return fmt.Errorf("GET_VRING_BASE %d: answer %x", i, b)
		}
		q.base = binary.LittleEndian.Uint32(b[4:])
	}
	return nil
}

// Reboot makes all queues new, as a driver does that starts over. To be
// called between Stop and Start.
func (m *Machine) Reboot() {
	for _, q := range m.queues {
		q.reset()
	}
}

// handOver sends all there is to know of one queue.
func (q *Queue) handOver() error {
	i := uint32(q.index)
	addr := binary.LittleEndian.AppendUint32(nil, i)
	addr = binary.LittleEndian.AppendUint32(addr, 0)
	for _, v := range []uint64{userBase + q.descAddr, userBase + q.usedAddr, userBase + q.availAddr, 0} {
		addr = binary.LittleEndian.AppendUint64(addr, v)
	}
	for _, step := range []struct {
		request uint32
		payload []byte
		fds     []int
	}{
		{SetVringNum, State(i, uint32(q.size)), nil},
		{SetVringBase, State(i, q.base), nil},
		{SetVringAddr, addr, nil},
		{SetVringKick, U64(uint64(i)), []int{q.kickFD}},
		{SetVringCall, U64(uint64(i)), []int{q.callFD}},
	} {
		if err := q.m.Send(step.request, 0, step.payload, step.fds...); err != nil {
			return err
		}
	}
	return nil
}

// eventfd makes an eventfd that does not block.
func eventfd() (int, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return -1, fmt.Errorf("eventfd: %w", err)
	}
	return fd, nil
}
