package vhostuser

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// request is the number of a front-end message type.
type request uint32

// Front-end message types (vhost-user specification, "Front-end message
// types"). Those that are missing belong to features that are never offered.
const (
	reqGetFeatures         request = 1
	reqSetFeatures         request = 2
	reqSetOwner            request = 3
	reqResetOwner          request = 4
	reqSetMemTable         request = 5
	reqSetVringNum         request = 8
	reqSetVringAddr        request = 9
	reqSetVringBase        request = 10
	reqGetVringBase        request = 11
	reqSetVringKick        request = 12
	reqSetVringCall        request = 13
	reqSetVringErr         request = 14
	reqGetProtocolFeatures request = 15
	reqSetProtocolFeatures request = 16
	reqGetQueueNum         request = 17
	reqSetVringEnable      request = 18
	reqGetConfig           request = 24
	reqSetConfig           request = 25
	reqResetDevice         request = 34
)

var requestNames = map[request]string{
	reqGetFeatures:         "GET_FEATURES",
	reqSetFeatures:         "SET_FEATURES",
	reqSetOwner:            "SET_OWNER",
	reqResetOwner:          "RESET_OWNER",
	reqSetMemTable:         "SET_MEM_TABLE",
	reqSetVringNum:         "SET_VRING_NUM",
	reqSetVringAddr:        "SET_VRING_ADDR",
	reqSetVringBase:        "SET_VRING_BASE",
	reqGetVringBase:        "GET_VRING_BASE",
	reqSetVringKick:        "SET_VRING_KICK",
	reqSetVringCall:        "SET_VRING_CALL",
	reqSetVringErr:         "SET_VRING_ERR",
	reqGetProtocolFeatures: "GET_PROTOCOL_FEATURES",
	reqSetProtocolFeatures: "SET_PROTOCOL_FEATURES",
	reqGetQueueNum:         "GET_QUEUE_NUM",
	reqSetVringEnable:      "SET_VRING_ENABLE",
	reqGetConfig:           "GET_CONFIG",
	reqSetConfig:           "SET_CONFIG",
	reqResetDevice:         "RESET_DEVICE",
}

func (r request) String() string {
	if s, ok := requestNames[r]; ok {
		return s
	}
	return fmt.Sprintf("request %d", uint32(r))
}

// Message flags: the version in the two lowest bits, then two booleans.
const (
	flagVersionMask = 0x3
	flagVersion     = 0x1
	flagReply       = 0x4
	flagNeedReply   = 0x8
)

const (
	headerSize = 12
	// maxPayload is well above the largest message served: a configuration
	// space of 256 bytes with its header, or a table of maxRegions.
	maxPayload = 1024
	// maxRegions is the protocol's limit without CONFIGURE_MEM_SLOTS.
	maxRegions = 8
	// maxConfig is VHOST_USER_MAX_CONFIG_SIZE.
	maxConfig = 256
)

// message is one message of the front end. Its descriptors are the handler's
// to take; closeFDs closes what nobody took.
type message struct {
	req     request
	flags   uint32
	payload []byte
	fds     []int
}

func (m *message) needReply() bool { return m.flags&flagNeedReply != 0 }

// takeFD hands over the message's only descriptor.
func (m *message) takeFD() (int, error) {
	if len(m.fds) != 1 {
		return -1, fmt.Errorf("%d descriptors: want 1", len(m.fds))
	}
	fd := m.fds[0]
	m.fds = nil
	return fd, nil
}

func (m *message) closeFDs() {
	for _, fd := range m.fds {
		unix.Close(fd)
	}
	m.fds = nil
}

// u64 decodes a payload that is one number.
func (m *message) u64() (uint64, error) {
	if len(m.payload) != 8 {
		return 0, m.sizeError(8)
	}
	return binary.LittleEndian.Uint64(m.payload), nil
}

// vringState decodes "vring state": an index and a number.
func (m *message) vringState() (index, num uint32, err error) {
	if len(m.payload) != 8 {
		return 0, 0, m.sizeError(8)
	}
	return binary.LittleEndian.Uint32(m.payload), binary.LittleEndian.Uint32(m.payload[4:]), nil
}

func (m *message) sizeError(want int) error {
	return fmt.Errorf("payload of %d bytes: want %d", len(m.payload), want)
}

// vringAddr is where a queue lies, in the front end's address space.
type vringAddr struct {
	desc, used, avail uint64
}

// vringAddress decodes "vring address": index, flags, descriptor table, used
// ring, available ring, log.
func (m *message) vringAddress() (index uint32, a vringAddr, err error) {
	if len(m.payload) != 40 {
		return 0, a, m.sizeError(40)
	}
	le := binary.LittleEndian
	if flags := le.Uint32(m.payload[4:]); flags != 0 {
		return 0, a, fmt.Errorf("vring flags %#x: logging was not offered", flags)
	}
	a = vringAddr{
		desc:  le.Uint64(m.payload[8:]),
		used:  le.Uint64(m.payload[16:]),
		avail: le.Uint64(m.payload[24:]),
	}
	return le.Uint32(m.payload), a, nil
}

// regionSpec is one "memory region description".
type regionSpec struct {
	guest, size, user, offset uint64
}

// memTable decodes "multiple memory regions description": a count, padding,
// and 32 bytes for each region.
func (m *message) memTable() ([]regionSpec, error) {
	if len(m.payload) < 8 {
		return nil, m.sizeError(8)
	}
	le := binary.LittleEndian
	n := le.Uint32(m.payload)
	if n > maxRegions {
		return nil, fmt.Errorf("%d memory regions: at most %d", n, maxRegions)
	}
	if want := 8 + 32*int(n); len(m.payload) != want {
		return nil, m.sizeError(want)
	}
	specs := make([]regionSpec, n)
	for i := range specs {
		b := m.payload[8+32*i:]
		specs[i] = regionSpec{
			guest:  le.Uint64(b),
			size:   le.Uint64(b[8:]),
			user:   le.Uint64(b[16:]),
			offset: le.Uint64(b[24:]),
		}
	}
	return specs, nil
}

// configSpace decodes "virtio device config space": offset, size, flags, then
// size bytes.
func (m *message) configSpace() (offset uint32, data []byte, err error) {
	if len(m.payload) < 12 {
		return 0, nil, m.sizeError(12)
	}
	le := binary.LittleEndian
	offset, data = le.Uint32(m.payload), m.payload[12:]
	if size := le.Uint32(m.payload[4:]); uint64(size) != uint64(len(data)) || size > maxConfig {
		return 0, nil, fmt.Errorf("configuration of %d bytes in a payload of %d", size, len(m.payload))
	}
	return offset, data, nil
}
