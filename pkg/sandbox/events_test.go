package sandbox

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vmrt/vmrt/api"
)

// eventfulAgent sends events, those of first on its first stream.
type eventfulAgent struct {
	api.AgentService
	streams     atomic.Int32
	first, rest []uint64
}

func (a *eventfulAgent) Events(ctx context.Context, _ *api.Empty, srv api.Agent_EventsServer) error {
	seqs := a.rest
	if a.streams.Add(1) == 1 {
		seqs = a.first
	}
	for _, seq := range seqs {
		if err := srv.Send(&api.Event{Seq: seq}); err != nil {
			return err
		}
	}
	<-ctx.Done()
	return ctx.Err()
}

// counted returns from, ..., to.
func counted(from, to uint64) (seqs []uint64) {
	for ; from <= to; from++ {
		seqs = append(seqs, from)
	}
	return seqs
}

// A host that is too busy to take events for more than a second gets each of
// them once all the same.
func TestEventsOfBusyHost(t *testing.T) {
	const n = 500
	agent := &eventfulAgent{first: counted(1, n), rest: counted(1, n)}
	s := agentOf(t, agent)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	next := uint64(1)
	err := s.Events(ctx, func(ev *api.Event) {
		if ev.Seq != next {
			t.Errorf("event %d; want %d", ev.Seq, next)
		}
		if next == 10 {
			// Longer than ttrpc waits (stream.go, receive).
			time.Sleep(1500 * time.Millisecond)
		}
		if next++; next > n {
			cancel()
		}
	})
	if next != n+1 {
		t.Errorf("Events = %v after event %d; want all %d", err, next-1, n)
	}
	if got := agent.streams.Load(); got < 2 {
		t.Errorf("streams = %d; want a second", got)
	}
}

// An agent that leaves events out, or repeats them on one stream, is not believed.
func TestEventsOutOfOrder(t *testing.T) {
	for _, tt := range []struct {
		events []uint64
		want   string
	}{
		{[]uint64{0}, "guest event 0 follows 0"},
		{[]uint64{2}, "guest event 2 follows 0"},
		{[]uint64{1, 2, 2}, "guest event 2 follows 2"},
		{[]uint64{1, 2, 4}, "guest event 4 follows 2"},
	} {
		s := agentOf(t, &eventfulAgent{first: tt.events})
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		taken := 0
		err := s.Events(ctx, func(*api.Event) { taken++ })
		cancel()
		if taken != len(tt.events)-1 || err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Events of %v = %v after %d; want %q after %d", tt.events, err, taken, tt.want, len(tt.events)-1)
		}
	}
}
