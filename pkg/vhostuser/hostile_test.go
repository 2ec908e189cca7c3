package vhostuser_test

import (
	"encoding/binary"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/vhostuser/vhosttest"
)

// A driver that breaks the rules ends the device with an error, and the front
// end is told.
func TestHostileRing(t *testing.T) {
	const next, write, indirect = vhosttest.Next, vhosttest.Write, vhosttest.Indirect
	for _, tc := range []struct {
		name string
		make func(s *serving, q *vhosttest.Queue, addr uint64)
		want string
	}{
		{"index far ahead", func(s *serving, q *vhosttest.Queue, addr uint64) {
			q.SetAvailIndex(queueSize + 1)
		}, "available index 9, 9 beyond the last one, in a queue of 8"},
		{"index behind", func(s *serving, q *vhosttest.Queue, addr uint64) {
			q.SetAvailIndex(0xffff)
		}, "available index 65535"},
		{"head out of range", func(s *serving, q *vhosttest.Queue, addr uint64) {
			q.Publish(queueSize)
		}, "descriptor 8"},
		{"next out of range", func(s *serving, q *vhosttest.Queue, addr uint64) {
			q.SetDescriptor(0, addr, 1, next, 0xffff)
			q.Publish(0)
		}, "descriptor 65535"},
		{"loop of one", func(s *serving, q *vhosttest.Queue, addr uint64) {
			q.SetDescriptor(2, addr, 1, next, 2)
			q.Publish(2)
		}, "number 8 of the chain"},
		{"loop of all", func(s *serving, q *vhosttest.Queue, addr uint64) {
			for i := range queueSize {
				q.SetDescriptor(i, addr, 1, next|write, uint16(i+1)%queueSize)
			}
			q.Publish(0)
		}, "number 8 of the chain"},
		{"no memory", func(s *serving, q *vhosttest.Queue, addr uint64) {
			q.SetDescriptor(0, 1<<40, 1, 0, 0)
			q.Publish(0)
		}, "not memory"},
		{"into the hole", func(s *serving, q *vhosttest.Queue, addr uint64) {
			q.SetDescriptor(0, 0xa0000-16, 17, 0, 0)
			q.Publish(0)
		}, "1 bytes at guest address 0xa0000: not memory"},
		{"past the end", func(s *serving, q *vhosttest.Queue, addr uint64) {
			q.SetDescriptor(0, uint64(len(s.Memory()))-1, 2, write, 0)
			q.Publish(0)
		}, "not memory"},
		{"address overflow", func(s *serving, q *vhosttest.Queue, addr uint64) {
			q.SetDescriptor(0, 1<<64-1, 1<<32-1, 0, 0)
			q.Publish(0)
		}, "not memory"},
		{"longest length", func(s *serving, q *vhosttest.Queue, addr uint64) {
			q.SetDescriptor(0, addr, 1<<32-1, 0, 0)
			q.Publish(0)
		}, "not memory"},
		{"readable after writable", func(s *serving, q *vhosttest.Queue, addr uint64) {
			q.SetDescriptor(0, addr, 1, next|write, 1)
			q.SetDescriptor(1, addr, 1, 0, 0)
			q.Publish(0)
		}, "readable after writable"},
		{"indirect and next", func(s *serving, q *vhosttest.Queue, addr uint64) {
			q.SetDescriptor(0, addr, 16, indirect|next, 1)
			q.Publish(0)
		}, "indirect table not allowed"},
		{"indirect in indirect", func(s *serving, q *vhosttest.Queue, addr uint64) {
			binary.LittleEndian.PutUint16(s.Memory()[addr+12:], indirect)
			q.SetDescriptor(0, addr, 16, indirect, 0)
			q.Publish(0)
		}, "indirect table not allowed"},
		{"indirect of half a descriptor", func(s *serving, q *vhosttest.Queue, addr uint64) {
			q.SetDescriptor(0, addr, 24, indirect, 0)
			q.Publish(0)
		}, "indirect table of 24 bytes"},
		{"indirect empty", func(s *serving, q *vhosttest.Queue, addr uint64) {
			q.SetDescriptor(0, addr, 0, indirect, 0)
			q.Publish(0)
		}, "indirect table of 0 bytes"},
		{"indirect huge", func(s *serving, q *vhosttest.Queue, addr uint64) {
			q.SetDescriptor(0, addr, 1<<32-16, indirect, 0)
			q.Publish(0)
		}, "indirect table of 4294967280 bytes"},
		{"indirect over the edge", func(s *serving, q *vhosttest.Queue, addr uint64) {
			q.SetDescriptor(0, 0xa0000-16, 32, indirect, 0)
			q.Publish(0)
		}, "indirect table of 32 bytes at guest address 0x9fff0: not memory"},
		{"indirect loop", func(s *serving, q *vhosttest.Queue, addr uint64) {
			b := s.Memory()[addr:]
			binary.LittleEndian.PutUint64(b, addr)
			binary.LittleEndian.PutUint32(b[8:], 1)
			binary.LittleEndian.PutUint16(b[12:], next)
			q.SetDescriptor(0, addr, 32, indirect, 0)
			q.Publish(0)
		}, "number 2 of the chain"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := serve(t)
			s.Features |= vhosttest.FeatureIndirect
			s.start(t)
			addr, _ := s.Alloc(4096)
			tc.make(s, s.Queue(0), addr)
			s.Queue(0).ForceKick()
			s.wantEnd(t, tc.want)
			if got := s.Queue(0).Err(); got == 0 {
				t.Error("the error descriptor was not signalled")
			}
		})
	}
}

func TestIndirectWithoutFeature(t *testing.T) {
	s := serve(t)
	s.start(t)
	addr, _ := s.Alloc(64)
	s.Queue(0).SetDescriptor(0, addr, 16, vhosttest.Indirect, 0)
	s.Queue(0).Publish(0)
	s.Queue(0).ForceKick()
	s.wantEnd(t, "indirect table not allowed")
}

// A driver that moves its index to and fro keeps nobody in a loop: after it
// the device still stops.
func TestFlippingIndex(t *testing.T) {
	s := serve(t)
	s.start(t)
	addr, _ := s.Alloc(16)
	q := s.Queue(0)
	q.SetDescriptor(0, addr, 1, 0, 0)
	stop := make(chan struct{})
	flipped := make(chan struct{})
	go func() {
		defer close(flipped)
		for {
			select {
			case <-stop:
				return
			default:
				q.SetAvailIndex(1)
				q.SetAvailIndex(0)
				q.ForceKick()
			}
		}
	}()
	s.stop()
	s.wait(t)
	close(stop)
	<-flipped
}

func vringAddr(index, flags uint32, desc, used, avail uint64) []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, index)
	b = le.AppendUint32(b, flags)
	for _, v := range []uint64{desc, used, avail, 0} {
		b = le.AppendUint64(b, v)
	}
	return b
}

func regions(rs ...[4]uint64) []byte {
	b := vhosttest.U64(uint64(len(rs)))
	for _, r := range rs {
		for _, v := range r {
			b = binary.LittleEndian.AppendUint64(b, v)
		}
	}
	return b
}

// A front end that breaks the protocol ends the session with an error that
// names the message.
func TestHostileMessages(t *testing.T) {
	tooMany := make([]byte, 1025)
	for _, tc := range []struct {
		name    string
		request uint32
		flags   uint32
		payload []byte
		fds     func(t *testing.T, s *serving) []int
		want    string
	}{
		{"unknown", 99, 0, nil, nil, "request 99: unknown request"},
		{"huge", vhosttest.SetFeatures, 0, tooMany, nil, "SET_FEATURES: payload of 1025 bytes: at most 1024"},
		{"reply flag", vhosttest.SetOwner, 4, nil, nil, "SET_OWNER: flags 0x5"},
		{"version", vhosttest.SetOwner, 2, nil, nil, "SET_OWNER: flags 0x3"},
		{"features short", vhosttest.SetFeatures, 0, []byte{1}, nil, "SET_FEATURES: payload of 1 bytes: want 8"},
		{"features not offered", vhosttest.SetFeatures, 0, vhosttest.U64(1 << 26), nil, "features 0x4000000 were not offered"},
		{"protocol features not offered", vhosttest.SetProtocolFeatures, 0, vhosttest.U64(1 << 8), nil, "protocol features 0x100 were not offered"},
		{"memory empty", vhosttest.SetMemTable, 0, nil, nil, "SET_MEM_TABLE: payload of 0 bytes"},
		{"memory count", vhosttest.SetMemTable, 0, vhosttest.U64(9), nil, "9 memory regions: at most 8"},
		{"memory short", vhosttest.SetMemTable, 0, vhosttest.U64(1), nil, "payload of 8 bytes: want 40"},
		{"memory without descriptors", vhosttest.SetMemTable, 0, regions([4]uint64{0, 4096, 0, 0}), nil, "1 memory regions with 0 descriptors"},
		{"memory in a pipe", vhosttest.SetMemTable, 0, regions([4]uint64{0, 4096, 0, 0}), pipe, "not a memfd"},
		{"memory in a file", vhosttest.SetMemTable, 0, regions([4]uint64{0, 4096, 0, 0}), file, "memfd without F_SEAL_SHRINK"},
		{"memory unsealed", vhosttest.SetMemTable, 0, regions([4]uint64{0, 4096, 0, 0}), unsealed, "memfd without F_SEAL_SHRINK"},
		{"memory beyond the file", vhosttest.SetMemTable, 0, regions([4]uint64{0, 8 << 20, 0, 0}), memory, "file of 4194304 bytes: want at least 8388608"},
		{"memory offset beyond the file", vhosttest.SetMemTable, 0, regions([4]uint64{0, 4096, 0, 4 << 20}), memory, "file of 4194304 bytes"},
		{"memory offset overflow", vhosttest.SetMemTable, 0, regions([4]uint64{0, 4096, 0, 1<<64 - 4096}), memory, "out of range"},
		{"memory size overflow", vhosttest.SetMemTable, 0, regions([4]uint64{4096, 1<<64 - 4096, 0, 0}), memory, "out of range"},
		{"memory user overflow", vhosttest.SetMemTable, 0, regions([4]uint64{0, 8192, 1<<64 - 4096, 0}), memory, "out of range"},
		{"memory of no size", vhosttest.SetMemTable, 0, regions([4]uint64{0, 0, 0, 0}), memory, "not made of pages"},
		{"memory of odd size", vhosttest.SetMemTable, 0, regions([4]uint64{0, 4097, 0, 0}), memory, "not made of pages"},
		{"memory at odd offset", vhosttest.SetMemTable, 0, regions([4]uint64{0, 4096, 0, 1}), memory, "not made of pages"},
		{"memory overlaps", vhosttest.SetMemTable, 0, regions([4]uint64{0, 8192, 0, 0}, [4]uint64{4096, 4096, 1 << 30, 0}), twice(memory), "overlaps the region at 0x0"},
		{"memory overlaps in the front end", vhosttest.SetMemTable, 0, regions([4]uint64{0, 8192, 0, 0}, [4]uint64{1 << 30, 4096, 4096, 0}), twice(memory), "front-end address 0x1000 overlaps"},
		{"memory moves a running queue away", vhosttest.SetMemTable, 0, regions([4]uint64{0, 4096, 0, 0}), memory, "queue 0: descriptor table: address"},
		{"num 0", vhosttest.SetVringNum, 0, vhosttest.State(0, 0), nil, "size 0 of queue 0"},
		{"num odd", vhosttest.SetVringNum, 0, vhosttest.State(0, 7), nil, "size 7 of queue 0"},
		{"num huge", vhosttest.SetVringNum, 0, vhosttest.State(0, 65536), nil, "size 65536 of queue 0"},
		{"num of no queue", vhosttest.SetVringNum, 0, vhosttest.State(2, 8), nil, "queue 2 of 2"},
		{"num while running", vhosttest.SetVringNum, 0, vhosttest.State(0, 8), nil, "queue 0 is running"},
		{"address short", vhosttest.SetVringAddr, 0, make([]byte, 39), nil, "payload of 39 bytes: want 40"},
		{"address with log", vhosttest.SetVringAddr, 0, vringAddr(0, 1, 0, 0, 0), nil, "vring flags 0x1"},
		{"address while running", vhosttest.SetVringAddr, 0, vringAddr(0, 0, 0, 0, 0), nil, "queue 0 is running"},
		{"base huge", vhosttest.SetVringBase, 0, vhosttest.State(0, 1<<16), nil, "base 0x10000 of queue 0"},
		{"base while running", vhosttest.SetVringBase, 0, vhosttest.State(1, 0), nil, "queue 1 is running"},
		{"base of no queue", vhosttest.GetVringBase, 0, vhosttest.State(1<<31, 0), nil, "queue 2147483648 of 2"},
		{"kick without descriptor", vhosttest.SetVringKick, 0, vhosttest.U64(0), nil, "0 descriptors: want 1"},
		{"kick by polling", vhosttest.SetVringKick, 0, vhosttest.U64(1 << 8), nil, "polling is not offered"},
		{"kick by pipe", vhosttest.SetVringKick, 0, vhosttest.U64(0), pipe, "want an eventfd"},
		{"call by file", vhosttest.SetVringCall, 0, vhosttest.U64(0), file, "want an eventfd"},
		{"call of no queue", vhosttest.SetVringCall, 0, vhosttest.U64(7), nil, "queue 7 of 2"},
		{"call with two descriptors", vhosttest.SetVringCall, 0, vhosttest.U64(0), twice(file), "2 descriptors: want 1"},
		{"too many descriptors", vhosttest.SetOwner, 0, nil, many, "more than 8 descriptors"},
		{"enable 2", vhosttest.SetVringEnable, 0, vhosttest.State(0, 2), nil, "enable 2"},
		{"configuration short", vhosttest.GetConfig, 0, make([]byte, 11), nil, "payload of 11 bytes: want 12"},
		{"configuration size", vhosttest.GetConfig, 0, []byte{0, 0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0}, nil, "configuration of 4294967295 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := serve(t)
			s.start(t)
			var fds []int
			if tc.fds != nil {
				fds = tc.fds(t, s)
			}
			if err := s.Send(tc.request, tc.flags, tc.payload, fds...); err != nil {
				t.Fatal(err)
			}
			s.wantEnd(t, tc.want)
		})
	}
}

// A refused message that wants an answer gets one before the session ends.
func TestRefusalIsAnswered(t *testing.T) {
	s := serve(t)
	s.start(t)
	if rc, err := s.Acked(vhosttest.SetVringNum, vhosttest.State(0, 7)); err != nil || rc == 0 {
		t.Errorf("SET_VRING_NUM 7 = %d, %v; want a refusal", rc, err)
	}
	s.wantEnd(t, "size 7")
}

func TestLegacyDriver(t *testing.T) {
	s := serve(t)
	s.Features = vhosttest.FeatureProtocolFeatures
	if _, err := s.Connect(echoQueues, queueSize, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err == nil {
		t.Error("Start() of a legacy driver = nil; want an error")
	}
	s.wantEnd(t, "VIRTIO_F_VERSION_1")
}

func TestBrokenOffMessage(t *testing.T) {
	front, back := socketpair(t)
	dev := newEcho()
	done := make(chan error, 1)
	go func() { done <- dev.backend.Serve(t.Context(), back) }()
	if _, err := front.Write([]byte{1, 0, 0, 0, 1}); err != nil {
		t.Fatal(err)
	}
	front.Close()
	if err := <-done; err == nil {
		t.Error("Serve() = nil; want an error")
	}
}

func owned(t *testing.T, fd int, err error) int {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func pipe(t *testing.T, _ *serving) []int {
	var p [2]int
	err := unix.Pipe2(p[:], unix.O_CLOEXEC)
	owned(t, p[1], err)
	return []int{owned(t, p[0], err)}
}

func file(t *testing.T, _ *serving) []int {
	// On tmpfs a file answers F_GET_SEALS, elsewhere it does not.
	f, err := os.CreateTemp("/dev/shm", "vhostuser")
	if err != nil {
		t.Skip("no /dev/shm:", err)
	}
	t.Cleanup(func() {
		f.Close()
		os.Remove(f.Name())
	})
	if err := f.Truncate(4096); err != nil {
		t.Fatal(err)
	}
	return []int{int(f.Fd())}
}

func unsealed(t *testing.T, _ *serving) []int {
	fd, err := unix.MemfdCreate("unsealed", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	owned(t, fd, err)
	if err := unix.Ftruncate(fd, 4096); err != nil {
		t.Fatal(err)
	}
	return []int{fd}
}

func memory(_ *testing.T, s *serving) []int { return s.MemFDs()[:1] }

func twice(f func(*testing.T, *serving) []int) func(*testing.T, *serving) []int {
	return func(t *testing.T, s *serving) []int {
		fds := f(t, s)
		return append(fds, fds...)
	}
}

func many(_ *testing.T, s *serving) []int {
	fds := make([]int, 20)
	for i := range fds {
		fds[i] = s.MemFDs()[0]
	}
	return fds
}

// A descriptor of a refused message is closed: sending it many times leaks
// nothing.
func TestRefusedDescriptorsAreClosed(t *testing.T) {
	serveOnce(t, func(*serving) {})
	noLeaks(t, func() {
		for i := range 20 {
			serveOnce(t, func(s *serving) {
				s.start(t)
				req := []uint32{vhosttest.SetVringCall, vhosttest.SetOwner, 99, vhosttest.SetMemTable}[i%4]
				if err := s.Send(req, 0, vhosttest.U64(1<<8), s.MemFDs()...); err != nil {
					t.Fatal(err)
				}
			})
		}
	})
}
