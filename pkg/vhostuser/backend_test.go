package vhostuser_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/vmrt/vmrt/pkg/vhostuser"
	"github.com/vmrt/vmrt/pkg/vhostuser/vhosttest"
)

func TestChains(t *testing.T) {
	for _, tc := range []struct {
		name     string
		features uint64
	}{
		{"plain", vhosttest.FeatureVersion1 | vhosttest.FeatureProtocolFeatures},
		{"event index", vhosttest.FeatureVersion1 | vhosttest.FeatureProtocolFeatures | vhosttest.FeatureEventIdx},
		{"no enable message", vhosttest.FeatureVersion1 | vhosttest.FeatureEventIdx},
		{"indirect", vhosttest.FeatureVersion1 | vhosttest.FeatureProtocolFeatures | vhosttest.FeatureIndirect},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := serve(t)
			s.Features = tc.features
			s.start(t)
			for i := range echoQueues {
				q := s.Queue(i)
				add := q.Add
				if tc.features&vhosttest.FeatureIndirect != 0 {
					add = func(bufs ...vhosttest.Buffer) (uint16, bool) {
						table, _ := s.Alloc(16 * len(bufs))
						return q.AddIndirect(table, bufs...)
					}
				}
				// More rounds than the queue has descriptors.
				for range 3 * queueSize {
					if got, want := s.echoed(t, i, add, "abc", "", "defgh"), "hgfedcba"; got != want {
						t.Fatalf("echo through queue %d = %q; want %q", i, got, want)
					}
				}
			}
		})
	}
}

// A chain may begin with descriptors of its own before an indirect table.
func TestMixedChain(t *testing.T) {
	s := serve(t)
	s.Features |= vhosttest.FeatureIndirect
	s.start(t)
	q := s.Queue(0)
	addr, mem := s.Alloc(64)
	copy(mem, "direct")
	table, entries := s.Alloc(32)
	le := binary.LittleEndian
	le.PutUint64(entries, addr)
	le.PutUint32(entries[8:], 6)
	le.PutUint16(entries[12:], vhosttest.Next)
	le.PutUint16(entries[14:], 1)
	le.PutUint64(entries[16:], addr+32)
	le.PutUint32(entries[24:], 12)
	le.PutUint16(entries[28:], vhosttest.Write)
	q.SetDescriptor(3, addr, 6, vhosttest.Next, 5)
	// The device is to ignore the write flag of an indirect descriptor.
	q.SetDescriptor(5, table, 32, vhosttest.Indirect|vhosttest.Write, 0)
	q.Publish(3)
	q.Kick()
	if _, n, err := q.TakeWait(); err != nil || n != 12 {
		t.Fatalf("TakeWait() = %d, %v; want 12 bytes", n, err)
	}
	if got, want := string(mem[32:44]), "tceridtcerid"; got != want {
		t.Errorf("echo = %q; want %q", got, want)
	}
}

func TestManyKicksAtOnce(t *testing.T) {
	s := serve(t)
	s.start(t)
	q := s.Queue(0)
	addr, _ := s.Alloc(2)
	for range 100 {
		for range queueSize / 2 {
			if _, ok := q.Add(vhosttest.Buffer{Addr: addr, Len: 1}, vhosttest.Buffer{Addr: addr + 1, Len: 1, Write: true}); !ok {
				t.Fatal("Add: queue is full")
			}
		}
		q.Kick()
		for range queueSize / 2 {
			if _, _, err := q.TakeWait(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// With the event index the device interrupts only at the entry asked for.
func TestCallSuppression(t *testing.T) {
	s := serve(t)
	s.start(t)
	q := s.Queue(0)
	addr, _ := s.Alloc(1)
	q.Add(vhosttest.Buffer{Addr: addr, Len: 1})
	q.Kick()
	// The first one always interrupts.
	if err := q.WaitCall(10 * time.Second); err != nil {
		t.Fatal(err)
	}
	q.Take()
	q.Add(vhosttest.Buffer{Addr: addr, Len: 1})
	q.Kick()
	// No interrupt was asked for since.
	waitFor(t, "chain given back", func() bool {
		_, _, ok := q.Take()
		return ok
	})
	if err := q.WaitCall(50 * time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("WaitCall() = %v; want no interrupt", err)
	}
	if q.WantCall() {
		t.Fatal("WantCall() = true; want an empty used ring")
	}
	q.Add(vhosttest.Buffer{Addr: addr, Len: 1})
	q.Kick()
	if err := q.WaitCall(10 * time.Second); err != nil {
		t.Errorf("WaitCall() = %v; want an interrupt", err)
	}
}

func TestConfig(t *testing.T) {
	s := serve(t)
	got, err := s.Connect(echoQueues, queueSize, 8)
	if err != nil || string(got) != "configur" {
		t.Errorf("configuration = %q, %v; want %q", got, err, "configur")
	}
	if got, err := s.Config(9, 4); err != nil || string(got) != "tion" {
		t.Errorf("Config(9, 4) = %q, %v; want %q", got, err, "tion")
	}
	if got, err := s.Config(10, 4); err != nil || len(got) != 0 {
		t.Errorf("Config(10, 4) = %q, %v; want nothing", got, err)
	}
}

func configPayload(offset uint32, data string) []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, offset)
	b = le.AppendUint32(b, uint32(len(data)))
	return append(append(b, 0, 0, 0, 0), data...)
}

func TestWriteConfig(t *testing.T) {
	t.Run("read-only", func(t *testing.T) {
		s := serve(t)
		s.start(t)
		if rc, err := s.Acked(vhosttest.SetConfig, configPayload(0, "C")); err != nil || rc == 0 {
			t.Errorf("SET_CONFIG = %d, %v; want a refusal", rc, err)
		}
		if got, err := s.Config(0, 1); err != nil || string(got) != "c" {
			t.Errorf("Config(0, 1) = %q, %v; want %q", got, err, "c")
		}
	})
	t.Run("writable", func(t *testing.T) {
		dev := newEcho()
		w := writableEcho{dev}
		dev.backend = vhostuser.NewBackend(w, echoQueues, &dev.mu)
		s := serveBackend(t, dev, dev.backend)
		s.start(t)
		if rc, err := s.Acked(vhosttest.SetConfig, configPayload(1, "ON")); err != nil || rc != 0 {
			t.Errorf("SET_CONFIG = %d, %v; want 0", rc, err)
		}
		if rc, err := s.Acked(vhosttest.SetConfig, configPayload(12, "xyz")); err != nil || rc == 0 {
			t.Errorf("SET_CONFIG past the end = %d, %v; want a refusal", rc, err)
		}
		if got, err := s.Config(0, 5); err != nil || string(got) != "cONfi" {
			t.Errorf("Config(0, 5) = %q, %v; want %q", got, err, "cONfi")
		}
	})
}

// A pause keeps the rings where they are, and no buffer gets lost or is used
// twice.
func TestStopAndContinue(t *testing.T) {
	s := serve(t)
	s.start(t)
	for i := range 5 {
		if got, want := s.echoed(t, 0, s.Queue(0).Add, "ab", "c"), "cba"; got != want {
			t.Fatalf("echo in period %d = %q; want %q", i, got, want)
		}
		if err := s.Stop(); err != nil {
			t.Fatal(err)
		}
		if got, want := s.Queue(0).Base(), uint32(2*i+1); got != want {
			t.Errorf("base after period %d = %d; want %d", i, got, want)
		}
		// Made available during the pause; the front end kicks at the start.
		addr, mem := s.Alloc(2)
		mem[0] = 'z'
		s.Queue(0).Add(vhosttest.Buffer{Addr: addr, Len: 1}, vhosttest.Buffer{Addr: addr + 1, Len: 1, Write: true})
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.Queue(0).TakeWait(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(mem, []byte("zz")) {
			t.Errorf("echo = %q; want %q", mem, "zz")
		}
	}
	s.dev.mu.Lock()
	defer s.dev.mu.Unlock()
	if s.dev.resets != 0 {
		t.Errorf("device was reset %d times; want 0", s.dev.resets)
	}
}

func TestReboot(t *testing.T) {
	s := serve(t)
	s.start(t)
	s.echoed(t, 0, s.Queue(0).Add, "old")
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	s.Reboot()
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	s.dev.mu.Lock()
	resets := s.dev.resets
	s.dev.mu.Unlock()
	if resets != 1 {
		t.Errorf("device was reset %d times; want 1", resets)
	}
	if got, want := s.echoed(t, 0, s.Queue(0).Add, "new"), "wen"; got != want {
		t.Errorf("echo = %q; want %q", got, want)
	}
}

func TestResetDevice(t *testing.T) {
	s := serve(t)
	s.start(t)
	s.echoed(t, 1, s.Queue(1).Add, "x")
	if rc, err := s.Acked(vhosttest.ResetDevice, nil); err != nil || rc != 0 {
		t.Fatalf("RESET_DEVICE = %d, %v; want 0", rc, err)
	}
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	if got, want := s.echoed(t, 1, s.Queue(1).Add, "xy"), "yx"; got != want {
		t.Errorf("echo = %q; want %q", got, want)
	}
	s.dev.mu.Lock()
	defer s.dev.mu.Unlock()
	if s.dev.resets != 1 {
		t.Errorf("device was reset %d times; want 1", s.dev.resets)
	}
}

// The front end may announce memory anew while the queues run.
func TestMemTableWhileRunning(t *testing.T) {
	s := serve(t)
	s.start(t)
	for range 3 {
		if rc, err := s.Acked(vhosttest.SetMemTable, s.MemTable(), s.MemFDs()...); err != nil || rc != 0 {
			t.Fatalf("SET_MEM_TABLE = %d, %v; want 0", rc, err)
		}
		if got, want := s.echoed(t, 0, s.Queue(0).Add, "ab"), "ba"; got != want {
			t.Errorf("echo = %q; want %q", got, want)
		}
	}
}

// What the driver made available before the machine ended is still taken.
func TestLastLook(t *testing.T) {
	s := serve(t)
	s.start(t)
	addr, mem := s.Alloc(2)
	mem[0] = 'k'
	q := s.Queue(0)
	q.Add(vhosttest.Buffer{Addr: addr, Len: 1}, vhosttest.Buffer{Addr: addr + 1, Len: 1, Write: true})
	if err := s.Stop(); err != nil { // without a kick
		t.Fatal(err)
	}
	if _, _, ok := q.Take(); !ok || mem[1] != 'k' {
		t.Errorf("chain was not taken before the stop")
	}
}

func TestEnd(t *testing.T) {
	t.Run("front end hangs up", func(t *testing.T) {
		s := serve(t)
		s.start(t)
		s.Machine.Close()
		if err := s.wait(t); err != nil {
			t.Errorf("Serve() = %v; want nil", err)
		}
	})
	t.Run("before the handshake", func(t *testing.T) {
		s := serve(t)
		s.Machine.Close()
		if err := s.wait(t); err != nil {
			t.Errorf("Serve() = %v; want nil", err)
		}
	})
	t.Run("context", func(t *testing.T) {
		s := serve(t)
		s.start(t)
		s.stop()
		if err := s.wait(t); !errors.Is(err, context.Canceled) {
			t.Errorf("Serve() = %v; want %v", err, context.Canceled)
		}
	})
	t.Run("stop", func(t *testing.T) {
		s := serve(t)
		s.start(t)
		want := errors.New("enough")
		s.dev.mu.Lock()
		s.dev.backend.Stop(want)
		s.dev.mu.Unlock()
		if err := s.wait(t); !errors.Is(err, want) {
			t.Errorf("Serve() = %v; want %v", err, want)
		}
	})
	t.Run("stopped before", func(t *testing.T) {
		dev := newEcho()
		want := errors.New("enough")
		dev.backend.Stop(want)
		s := serveBackend(t, dev, dev.backend)
		if err := s.wait(t); !errors.Is(err, want) {
			t.Errorf("Serve() = %v; want %v", err, want)
		}
	})
}
