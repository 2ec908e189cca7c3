package qemu_test

import (
	"encoding/binary"
	"io"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// silentVsock serves just as much of vhost-user as QEMU wants before it starts
// a guest with a vsock device (docs/interop/vhost-user in QEMU's sources). The
// device it describes works for the driver and never answers. It returns
// QEMU's end, which the caller owns; the served end closes with it.
func silentVsock(t testing.TB, cid uint64) *os.File {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours := os.NewFile(uintptr(fds[0]), "vhost-user")
	conn, err := net.FileConn(ours)
	if err != nil {
		t.Fatal(err)
	}
	ours.Close()
	served := make(chan struct{})
	go func() {
		defer close(served)
		serveVhostUser(conn, cid)
	}()
	t.Cleanup(func() {
		conn.Close()
		<-served
	})
	return os.NewFile(uintptr(fds[1]), "vhost-user-qemu")
}

// The requests that are answered, and the header's flags.
const (
	getFeatures         = 1
	getVringBase        = 11
	getProtocolFeatures = 15
	getQueueNum         = 17
	getConfig           = 24

	flagReply     = 1 << 2
	flagNeedReply = 1 << 3
)

func serveVhostUser(conn net.Conn, cid uint64) {
	var header [12]byte
	for {
		// Plain reads drop the descriptors that come along: the kernel
		// closes them.
		if _, err := io.ReadFull(conn, header[:]); err != nil {
			return
		}
		request := binary.LittleEndian.Uint32(header[0:])
		flags := binary.LittleEndian.Uint32(header[4:])
		payload := make([]byte, binary.LittleEndian.Uint32(header[8:])&0xffff)
		if _, err := io.ReadFull(conn, payload); err != nil {
			return
		}
		var answer []byte
		u64 := func(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }
		switch request {
		case getFeatures:
			answer = u64(1<<32 | 1<<30 | 1<<29 | 1<<24) // VERSION_1, PROTOCOL_FEATURES, EVENT_IDX
		case getProtocolFeatures:
			answer = u64(1<<9 | 1<<3) // CONFIG, REPLY_ACK
		case getQueueNum:
			answer = u64(2)
		case getVringBase:
			answer = payload
		case getConfig:
			answer = append(payload[:12:12], u64(cid)...)
		default:
			if flags&flagNeedReply == 0 {
				continue
			}
			answer = u64(0)
		}
		out := append([]byte(nil), header[:4]...)
		out = binary.LittleEndian.AppendUint32(out, 1|flagReply)
		out = binary.LittleEndian.AppendUint32(out, uint32(len(answer)))
		if _, err := conn.Write(append(out, answer...)); err != nil {
			return
		}
	}
}
