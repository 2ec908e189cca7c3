package vhostuser_test

import (
	"bytes"
	"io"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/vhostuser/vhosttest"
)

// Kinds of descriptors that a fuzzed message brings along.
const (
	fdNone = iota
	fdEvent
	fdMemory
	fdMemoryTwice
	fdPipe
	fdKinds
)

// script encodes messages for FuzzMessages: request, flags, kind of
// descriptors, length, payload.
type script []byte

func (s script) add(request, flags, fds byte, payload []byte) script {
	s = append(s, request, flags, fds, byte(len(payload)))
	return append(s, payload...)
}

// FuzzMessages feeds a back end whose queues run any messages. It must end,
// and the device be usable to the last.
func FuzzMessages(f *testing.F) {
	table := regions([4]uint64{0, 4 << 20, 0x7f5500000000, 0})
	f.Add([]byte(script(nil).
		add(vhosttest.GetFeatures, 1, fdNone, nil).
		add(vhosttest.SetOwner, 1, fdNone, nil).
		add(vhosttest.GetConfig, 1, fdNone, configPayload(0, "1234")).
		add(vhosttest.SetConfig, 9, fdNone, configPayload(0, "1234"))))
	f.Add([]byte(script(nil).
		add(vhosttest.SetMemTable, 9, fdMemory, table).
		add(vhosttest.SetVringEnable, 1, fdNone, vhosttest.State(0, 0)).
		add(vhosttest.GetVringBase, 1, fdNone, vhosttest.State(0, 0)).
		add(vhosttest.SetVringNum, 1, fdNone, vhosttest.State(0, 8)).
		add(vhosttest.SetVringBase, 1, fdNone, vhosttest.State(0, 7)).
		add(vhosttest.SetVringAddr, 1, fdNone, vringAddr(0, 0, 0x7f55000c0000, 0x7f55000c1000, 0x7f55000c2000)).
		add(vhosttest.SetVringKick, 1, fdEvent, vhosttest.U64(0)).
		add(vhosttest.SetVringCall, 1, fdEvent, vhosttest.U64(0)).
		add(vhosttest.SetVringErr, 1, fdEvent, vhosttest.U64(0)).
		add(vhosttest.SetVringEnable, 9, fdNone, vhosttest.State(0, 1)).
		add(vhosttest.ResetDevice, 9, fdNone, nil)))
	f.Add([]byte(script(nil).add(vhosttest.SetMemTable, 9, fdMemoryTwice, table).add(vhosttest.SetVringKick, 1, fdPipe, vhosttest.U64(1))))
	f.Fuzz(func(t *testing.T, data []byte) {
		s := serve(t)
		s.start(t)
		// A back end waits for a front end that takes no answers.
		go io.Copy(io.Discard, s.front)
		var event [2]int
		for i := range event {
			fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
			event[i] = owned(t, fd, err)
		}
		fds := map[byte][]int{
			fdEvent:       event[:1],
			fdMemory:      s.MemFDs()[:1],
			fdMemoryTwice: s.MemFDs(),
			fdPipe:        pipe(t, s),
		}
		for r := bytes.NewBuffer(data); r.Len() >= 4; {
			h := r.Next(4)
			// A message that ended the session makes later ones fail.
			if err := s.Send(uint32(h[0]), uint32(h[1]), r.Next(int(h[3])), fds[h[2]%fdKinds]...); err != nil {
				break
			}
		}
		s.Queue(0).ForceKick()
		s.Machine.Close()
		s.wait(t)
		s.dev.mu.Lock()
		defer s.dev.mu.Unlock()
		for i := range echoQueues {
			if q := s.dev.backend.Queue(i); q.Running() {
				t.Errorf("queue %d runs after Serve has returned", i)
			}
		}
	})
}
