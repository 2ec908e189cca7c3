package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// handle carries out one message. The reply is nil for messages that have
// none of their own.
func (b *Backend) handle(m *message) (reply []byte, err error) {
	switch m.req {
	case reqGetFeatures:
		return u64(b.offered()), nil
	case reqSetFeatures:
		return nil, b.setFeatures(m)
	case reqGetProtocolFeatures:
		return u64(protocolFeatures), nil
	case reqSetProtocolFeatures:
		return nil, b.setProtocolFeatures(m)
	case reqGetQueueNum:
		return u64(uint64(len(b.queues))), nil
	case reqSetOwner:
		return nil, nil
	case reqResetOwner, reqResetDevice:
		b.reset(m.req == reqResetDevice)
		return nil, nil
	case reqSetMemTable:
		return nil, b.setMemTable(m)
	case reqGetConfig:
		return b.getConfig(m)
	case reqSetConfig:
		return nil, b.setConfig(m)
	}
	return b.handleVring(m)
}

func u64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

// offered returns the feature bits that the front end may choose from.
func (b *Backend) offered() uint64 { return b.dev.Features() | ringFeatures }

func (b *Backend) setFeatures(m *message) error {
	v, err := m.u64()
	if err != nil {
		return err
	}
	if unknown := v &^ b.offered(); unknown != 0 {
		return fmt.Errorf("features %#x were not offered", unknown)
	}
	// QEMU also sets features before the driver has chosen any. Legacy
	// drivers, whose rings differ, are refused when a queue starts.
	b.features = v
	return nil
}

func (b *Backend) setProtocolFeatures(m *message) error {
	v, err := m.u64()
	if err != nil {
		return err
	}
	if unknown := v &^ protocolFeatures; unknown != 0 {
		return fmt.Errorf("protocol features %#x were not offered", unknown)
	}
	b.protocol = v
	return nil
}

// reset disables all queues and, if asked to, makes the device forget its
// driver.
func (b *Backend) reset(device bool) {
	for i, q := range b.queues {
		b.disable(i)
		q.enabled = false
	}
	if device {
		b.dev.Reset()
	}
}

// setMemTable maps the guest's memory anew and moves running queues over.
func (b *Backend) setMemTable(m *message) error {
	specs, err := m.memTable()
	if err != nil {
		return err
	}
	mem, err := newMemory(specs, m.fds)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, q := range b.queues {
		if !q.running {
			continue
		}
		if err := q.mapRings(mem); err != nil {
			for _, q := range b.queues {
				q.stop()
			}
			mem.close()
			return fmt.Errorf("queue %d: %w", i, err)
		}
	}
	b.mem.close()
	b.mem = mem
	return nil
}

func (b *Backend) getConfig(m *message) ([]byte, error) {
	offset, data, err := m.configSpace()
	if err != nil {
		return nil, err
	}
	config := b.dev.Config()
	if uint64(offset)+uint64(len(data)) > uint64(len(config)) {
		// An answer without data says that it failed.
		reply := make([]byte, 12)
		binary.LittleEndian.PutUint32(reply, offset)
		return reply, nil
	}
	reply := append([]byte(nil), m.payload[:12]...)
	return append(reply, config[offset:][:len(data)]...), nil
}

func (b *Backend) setConfig(m *message) error {
	offset, data, err := m.configSpace()
	if err != nil {
		return err
	}
	w, ok := b.dev.(ConfigWriter)
	if !ok {
		return &deniedError{errors.New("configuration is read-only")}
	}
	if err := w.WriteConfig(offset, data); err != nil {
		return &deniedError{err}
	}
	return nil
}

// handleVring carries out the messages about one queue.
func (b *Backend) handleVring(m *message) (reply []byte, err error) {
	switch m.req {
	case reqSetVringNum:
		return nil, b.setVringNum(m)
	case reqSetVringAddr:
		return nil, b.setVringAddr(m)
	case reqSetVringBase:
		return nil, b.setVringBase(m)
	case reqGetVringBase:
		return b.getVringBase(m)
	case reqSetVringKick:
		return nil, b.setVringKick(m)
	case reqSetVringCall, reqSetVringErr:
		return nil, b.setVringEvent(m)
	case reqSetVringEnable:
		return nil, b.setVringEnable(m)
	}
	return nil, errors.New("unknown request")
}

// queue returns the queue that a message is about.
func (b *Backend) queue(index uint32) (*Queue, error) {
	if uint64(index) >= uint64(len(b.queues)) {
		return nil, fmt.Errorf("queue %d of %d", index, len(b.queues))
	}
	return b.queues[index], nil
}

// stopped returns the queue that a message is about if that is not running.
func (b *Backend) stopped(index uint32) (*Queue, error) {
	q, err := b.queue(index)
	if err == nil && q.watcher != nil {
		err = fmt.Errorf("queue %d is running", index)
	}
	return q, err
}

func (b *Backend) setVringNum(m *message) error {
	index, num, err := m.vringState()
	if err != nil {
		return err
	}
	if num == 0 || num > maxQueueSize || num&(num-1) != 0 {
		return fmt.Errorf("size %d of queue %d: want a power of two up to %d", num, index, maxQueueSize)
	}
	q, err := b.stopped(index)
	if err != nil {
		return err
	}
	q.size = num
	return nil
}

// setVringAddr only records where the queue is: the memory table may come
// later.
func (b *Backend) setVringAddr(m *message) error {
	index, addr, err := m.vringAddress()
	if err != nil {
		return err
	}
	q, err := b.stopped(index)
	if err != nil {
		return err
	}
	q.addr, q.hasAddr = addr, true
	return nil
}

func (b *Backend) setVringBase(m *message) error {
	index, base, err := m.vringState()
	if err != nil {
		return err
	}
	if base > 0xffff {
		return fmt.Errorf("base %#x of queue %d", base, index)
	}
	q, err := b.stopped(index)
	if err != nil {
		return err
	}
	if q.nextAvail != uint16(base) {
		b.dev.Reset()
	}
	q.nextAvail = uint16(base)
	return nil
}

// getVringBase stops a queue and returns where it continues.
func (b *Backend) getVringBase(m *message) ([]byte, error) {
	index, _, err := m.vringState()
	if err != nil {
		return nil, err
	}
	q, err := b.queue(index)
	if err != nil {
		return nil, err
	}
	b.disable(int(index))
	q.hasAddr = false
	q.setKick(nil)
	reply := binary.LittleEndian.AppendUint32(nil, index)
	return binary.LittleEndian.AppendUint32(reply, uint32(q.nextAvail)), nil
}

// Payload of messages with an eventfd: the queue in the low byte, and whether
// no descriptor comes with it.
const (
	vringIndexMask = 0xff
	vringNoFD      = 1 << 8
)

// eventFD returns the queue and the descriptor (or noEventFD) of a message.
func (b *Backend) eventFD(m *message) (index int, q *Queue, fd eventFD, err error) {
	v, err := m.u64()
	if err != nil {
		return 0, nil, noEventFD, err
	}
	index = int(v & vringIndexMask)
	if q, err = b.queue(uint32(index)); err != nil {
		return 0, nil, noEventFD, err
	}
	if v&vringNoFD != 0 {
		return index, q, noEventFD, nil
	}
	raw, err := m.takeFD()
	if err != nil {
		return 0, nil, noEventFD, err
	}
	if err := checkEventFD(raw); err != nil {
		unix.Close(raw)
		return 0, nil, noEventFD, err
	}
	return index, q, eventFD(raw), nil
}

// checkEventFD makes sure that signalling fd neither blocks nor does anything
// else than signalling.
func checkEventFD(fd int) error {
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return err
	}
	if name != "anon_inode:[eventfd]" {
		return fmt.Errorf("descriptor is %s: want an eventfd", name)
	}
	return unix.SetNonblock(fd, true)
}

func (b *Backend) setVringKick(m *message) error {
	index, q, fd, err := b.eventFD(m)
	if err != nil {
		return err
	}
	if fd == noEventFD {
		return fmt.Errorf("queue %d: polling is not offered", index)
	}
	kick := os.NewFile(uintptr(fd), fmt.Sprintf("kick %d", index))
	if err := kick.SetReadDeadline(time.Time{}); err != nil {
		kick.Close()
		return fmt.Errorf("queue %d: %w", index, err)
	}
	b.disable(index)
	q.setKick(kick)
	return b.enable(index)
}

// setVringEvent takes a call or an error descriptor.
func (b *Backend) setVringEvent(m *message) error {
	_, q, fd, err := b.eventFD(m)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	slot := &q.call
	if m.req == reqSetVringErr {
		slot = &q.err
	}
	slot.close()
	*slot = fd
	if m.req == reqSetVringCall && q.running {
		// A call may have gone to the old descriptor unseen.
		fd.signal()
	}
	return nil
}

func (b *Backend) setVringEnable(m *message) error {
	index, num, err := m.vringState()
	if err != nil {
		return err
	}
	q, err := b.queue(index)
	if err != nil {
		return err
	}
	if num > 1 {
		return fmt.Errorf("enable %d", num)
	}
	q.enabled = num == 1
	if !q.enabled {
		b.disable(int(index))
		return nil
	}
	return b.enable(int(index))
}
