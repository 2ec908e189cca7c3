package qmp_test

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmrt/vmrt/pkg/hypervisor/qemu/qmp"
)

// emitter makes the fake send events on the command "emit".
func emitter(lines ...string) func(*fakeVMM) map[string]func(*fakeRequest) {
	return func(f *fakeVMM) map[string]func(*fakeRequest) {
		return map[string]func(*fakeRequest){"emit": func(r *fakeRequest) {
			for _, l := range lines {
				f.send("%s", l)
			}
			f.answer(r, "{}")
		}}
	}
}

func TestEvents(t *testing.T) {
	c := connect(t, emitter(
		`{"timestamp": {"seconds": 1700000000, "microseconds": 250000}, "event": "DEVICE_DELETED", "data": {"device": "d0"}}`,
		`{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "STOP"}`,
		`{"timestamp": {"seconds": 1, "microseconds": 0}, "event": "RESUME", "data": null}`,
	))
	all, stop, none := c.Subscribe(), c.Subscribe("STOP", "SHUTDOWN"), c.Subscribe("RESET")
	defer all.Close()
	defer stop.Close()
	if err := c.Execute(timeout(t), "emit", nil, nil); err != nil {
		t.Fatal(err)
	}
	none.Close()
	want := []qmp.Event{
		{Name: "DEVICE_DELETED", Data: []byte(`{"device": "d0"}`), Time: time.Unix(1700000000, 250e6)},
		{Name: "STOP"},
		{Name: "RESUME", Time: time.Unix(1, 0)},
	}
	for _, w := range want {
		got, err := all.Next(timeout(t))
		if diff := cmp.Diff(w, got); err != nil || diff != "" {
			t.Errorf("Next() = %v (-want +got):\n%s", err, diff)
		}
	}
	if got, err := stop.Next(timeout(t)); err != nil || got.Name != "STOP" {
		t.Errorf("filtered Next() = %v, %v; want STOP", got, err)
	}
	if ev, err := none.Next(timeout(t)); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("Next() of a closed subscription = %v, %v; want ErrClosed", ev, err)
	}
	none.Close()
}

// TestSubscribeBeforeHandshake: an event right behind the negotiation's answer
// reaches a subscription that was made before.
func TestSubscribeBeforeHandshake(t *testing.T) {
	conn := listen(t, func(f *fakeVMM) {
		f.send(greeting)
		r := f.next()
		f.answer(r, "{}")
		f.send(`{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-panic"}}`)
		f.conn.Close()
	})
	c := qmp.New(conn)
	defer c.Close()
	s := c.Subscribe("SHUTDOWN")
	defer s.Close()
	if err := c.Handshake(timeout(t)); err != nil {
		t.Fatal(err)
	}
	if ev, err := s.Next(timeout(t)); err != nil || ev.Name != "SHUTDOWN" {
		t.Errorf("Next() = %v, %v; want SHUTDOWN", ev, err)
	}
	// Then the connection ends, and the subscription with it.
	if ev, err := s.Next(timeout(t)); !errors.Is(err, io.EOF) {
		t.Errorf("Next() after the end = %v, %v; want io.EOF", ev, err)
	}
	late := c.Subscribe()
	if ev, err := late.Next(timeout(t)); !errors.Is(err, io.EOF) {
		t.Errorf("Next() of a late subscription = %v, %v; want io.EOF", ev, err)
	}
}

func TestSlowReceiver(t *testing.T) {
	flood := make([]string, 1000)
	for i := range flood {
		flood[i] = `{"event": "X"}`
	}
	c := connect(t, emitter(flood...))
	slow, other := c.Subscribe("X"), c.Subscribe("Y")
	defer slow.Close()
	defer other.Close()
	// The flood neither blocks the connection nor ends it.
	if err := c.Execute(timeout(t), "emit", nil, nil); err != nil {
		t.Fatalf("Execute() behind a flood of events = %v", err)
	}
	n := 0
	for range slow.Events() {
		n++
	}
	if err := slow.Err(); !errors.Is(err, qmp.ErrOverrun) || n == 0 || n == len(flood) {
		t.Errorf("slow subscription ended with %v after %d events; want ErrOverrun after some", err, n)
	}
	if err := other.Err(); err != nil {
		t.Errorf("the other subscription ended with %v", err)
	}
}

func TestNextEndsWithItsContext(t *testing.T) {
	c := connect(t, nil)
	s := c.Subscribe()
	defer s.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if ev, err := s.Next(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Next() = %v, %v; want a deadline error", ev, err)
	}
}
