package events

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	"github.com/containerd/typeurl/v2"
	"github.com/google/go-cmp/cmp"

	"github.com/vmrt/vmrt/api"
)

const patience = 10 * time.Second

// collector is the far end of a stream.
type collector struct {
	mu   sync.Mutex
	got  []string
	seqs []uint64
	more chan struct{}
	fail int // send fails when this many were taken; -1 never
}

func newCollector() *collector { return &collector{more: make(chan struct{}, 1<<16), fail: -1} }

var errBroken = errors.New("connection broken")

func (c *collector) send(e *api.Event) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.got) == c.fail {
		return errBroken
	}
	v, err := typeurl.UnmarshalAny(e.Event)
	if err != nil {
		return err
	}
	switch v := v.(type) {
	case *eventstypes.TaskExit:
		c.got = append(c.got, "exit "+v.ID)
	case *eventstypes.TaskOOM:
		c.got = append(c.got, "oom "+v.ContainerID)
	default:
		c.got = append(c.got, fmt.Sprintf("%T", v))
	}
	c.seqs = append(c.seqs, e.Seq)
	c.more <- struct{}{}
	return nil
}

func (c *collector) await(t *testing.T, n int) []string {
	t.Helper()
	deadline := time.After(patience)
	for {
		c.mu.Lock()
		got := slices.Clone(c.got)
		c.mu.Unlock()
		if len(got) >= n {
			return got
		}
		select {
		case <-c.more:
		case <-deadline:
			t.Fatalf("events = %v; want %d of them", got, n)
		}
	}
}

func publish(t *testing.T, q *Queue, event any) {
	t.Helper()
	if err := q.Publish(context.Background(), "/topic", event); err != nil {
		t.Fatal(err)
	}
}

func exit(n int) *eventstypes.TaskExit {
	return &eventstypes.TaskExit{ContainerID: "c", ID: fmt.Sprint(n)}
}

func TestOrderFromTheFirst(t *testing.T) {
	q := New(nil)
	for n := range 1000 {
		publish(t, q, exit(n))
	}
	c := newCollector()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- q.Stream(ctx, c.send) }()
	for n := range 1000 {
		publish(t, q, exit(1000+n))
	}
	got := c.await(t, 2000)
	for n, e := range got {
		if want := fmt.Sprintf("exit %d", n); e != want || c.seqs[n] != uint64(n+1) {
			t.Fatalf("event %d = %s, number %d; want %s, number %d", n, e, c.seqs[n], want, n+1)
		}
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("Stream() = %v; want %v", err, context.Canceled)
	}
	if len(q.events) > Replay {
		t.Errorf("events kept = %d; want at most %d", len(q.events), Replay)
	}
}

// What a broken stream did not send comes next; what it sent is repeated.
func TestBrokenStream(t *testing.T) {
	q := New(nil)
	for n := range 5 {
		publish(t, q, exit(n))
	}
	first := newCollector()
	first.fail = 3
	if err := q.Stream(context.Background(), first.send); !errors.Is(err, errBroken) {
		t.Fatalf("Stream() = %v; want %v", err, errBroken)
	}
	q.Close()
	second := newCollector()
	if err := q.Stream(context.Background(), second.send); err != nil {
		t.Fatalf("Stream() = %v; want nil after Close", err)
	}
	if diff := cmp.Diff([]uint64{1, 2, 3, 4, 5}, second.seqs); diff != "" {
		t.Errorf("event numbers of the second stream (-want +got):\n%s", diff)
	}
}

func TestNewStreamReplaces(t *testing.T) {
	q := New(nil)
	first, second := newCollector(), newCollector()
	ended := make(chan error, 1)
	go func() { ended <- q.Stream(context.Background(), first.send) }()
	publish(t, q, exit(1))
	first.await(t, 1)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go q.Stream(ctx, second.send)
	if err := <-ended; !errors.Is(err, ErrReplaced) {
		t.Errorf("first Stream() = %v; want %v", err, ErrReplaced)
	}
	publish(t, q, exit(2))
	if diff := cmp.Diff([]string{"exit 1", "exit 2"}, second.await(t, 2)); diff != "" {
		t.Errorf("events of the second stream (-want +got):\n%s", diff)
	}
}

// A container that runs out of memory over and over while nobody reads must
// not fill the agent's memory, nor hide an exit.
func TestOOMsAreKeptOnce(t *testing.T) {
	q := New(nil)
	for range 1000 {
		publish(t, q, &eventstypes.TaskOOM{ContainerID: "a"})
		publish(t, q, &eventstypes.TaskOOM{ContainerID: "b"})
	}
	publish(t, q, exit(1))
	c := newCollector()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go q.Stream(ctx, c.send)
	c.await(t, 3)
	publish(t, q, &eventstypes.TaskOOM{ContainerID: "a"})
	want := []string{"oom a", "oom b", "exit 1", "oom a"}
	if diff := cmp.Diff(want, c.await(t, 4)); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}

func TestExitHook(t *testing.T) {
	var got []string
	q := New(func(container, process string) { got = append(got, container+"/"+process) })
	publish(t, q, &eventstypes.TaskStart{ContainerID: "c"})
	publish(t, q, exit(7))
	if diff := cmp.Diff([]string{"c/7"}, got); diff != "" {
		t.Errorf("exits told (-want +got):\n%s", diff)
	}
}

func TestCreateEventNamesNoPaths(t *testing.T) {
	q := New(nil)
	publish(t, q, &eventstypes.TaskCreate{ContainerID: "c", IO: &eventstypes.TaskIO{Stdout: "/run/vmrt/io/1-stdout"}})
	var got eventstypes.TaskCreate
	if err := typeurl.UnmarshalTo(q.events[0].Event, &got); err != nil {
		t.Fatal(err)
	}
	if got.IO != nil {
		t.Errorf("TaskCreate.IO = %v; want none", got.IO)
	}
}
