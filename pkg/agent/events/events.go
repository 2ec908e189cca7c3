// Package events queues what the task service publishes until the host has
// taken it.
//
// Order: events leave in the order in which they were published, numbered
// from 1 without gaps. Exits are never dropped, and publishing never waits:
// the queue is bounded by what the host itself asks for, since each of its
// calls leads to at most two events. The one kind that a container can cause
// by itself, running out of memory, is kept once for each container until it
// is sent.
//
// A stream may break with events in flight. The next stream therefore starts
// with the last Replay events that the one before has sent; their numbers say
// which of them the host has already.
package events

import (
	"context"
	"errors"
	"fmt"
	"sync"

	eventstypes "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmrt/vmrt/api"
)

// Replay is the number of sent events that a new stream repeats: those that a
// connection can hold while the host does not read.
const Replay = 1024

// ErrReplaced ends a stream when a newer one has begun.
var ErrReplaced = errors.New("a newer event stream has begun")

// Queue is an events.Publisher that the task service closes. The zero value is not usable; see New.
type Queue struct {
	onExit func(container, process string)

	mu       sync.Mutex
	events   []*api.Event    // sent ones first
	sent     int             // how many of events were sent on the current stream
	ooms     map[string]bool // containers with an out-of-memory event not yet sent
	seq      uint64
	stream   uint64        // number of the stream that may send
	changed  chan struct{} // closed and replaced whenever a stream should look
	finished bool
}

var _ events.Publisher = (*Queue)(nil)

// New returns an empty queue. onExit, if not nil, is called after each exit
// was queued; process is the exec id, or the container's for its init.
func New(onExit func(container, process string)) *Queue {
	return &Queue{onExit: onExit, ooms: make(map[string]bool), changed: make(chan struct{})}
}

// Publish queues event, which must be one of containerd's task events.
func (q *Queue) Publish(_ context.Context, topic string, event events.Event) error {
	oom, isOOM := event.(*eventstypes.TaskOOM)
	if c, ok := event.(*eventstypes.TaskCreate); ok {
		c.IO = nil // paths of this guest's FIFOs
	}
	encoded, err := typeurl.MarshalAny(event)
	if err != nil {
		return fmt.Errorf("publish %s: %w", topic, err)
	}
	if q.queue(&api.Event{
		Topic: topic,
		Event: &anypb.Any{TypeUrl: encoded.GetTypeUrl(), Value: encoded.GetValue()},
		Time:  timestamppb.Now(),
	}, isOOM, oom.GetContainerID()) {
		if e, ok := event.(*eventstypes.TaskExit); ok && q.onExit != nil {
			q.onExit(e.ContainerID, e.ID)
		}
	}
	return nil
}

func (q *Queue) queue(e *api.Event, oom bool, container string) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if oom {
		if q.ooms[container] {
			return false
		}
		q.ooms[container] = true
	}
	q.seq++
	e.Seq = q.seq
	q.events = append(q.events, e)
	q.wake()
	return true
}

// wake must be called with mu held.
func (q *Queue) wake() {
	close(q.changed)
	q.changed = make(chan struct{})
}

// Close ends the current stream once it has sent everything.
func (q *Queue) Close() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.finished {
		q.finished = true
		q.wake()
	}
	return nil
}

// Stream sends events until ctx ends, send fails, Close was called and the
// queue is empty, or another Stream begins.
func (q *Queue) Stream(ctx context.Context, send func(*api.Event) error) error {
	q.mu.Lock()
	q.stream++
	me := q.stream
	q.sent = 0
	q.wake()
	q.mu.Unlock()
	for {
		e, wait, err := q.next(me)
		switch {
		case err != nil:
			return err
		case e != nil:
			if err := send(e); err != nil {
				return fmt.Errorf("send event %d: %w", e.Seq, err)
			}
			q.markSent(me)
		case wait == nil:
			return nil
		default:
			select {
			case <-wait:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
}

// next returns the event to send, or what to wait for, or neither when the
// queue has ended.
func (q *Queue) next(me uint64) (*api.Event, <-chan struct{}, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case q.stream != me:
		return nil, nil, fmt.Errorf("event stream: %w: %w", ErrReplaced, errdefs.ErrAborted)
	case q.sent < len(q.events):
		return q.events[q.sent], nil, nil
	case q.finished:
		return nil, nil, nil
	}
	return nil, q.changed, nil
}

func (q *Queue) markSent(me uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.stream != me {
		return
	}
	var oom eventstypes.TaskOOM
	if e := q.events[q.sent].Event; typeurl.Is(e, &oom) && typeurl.UnmarshalTo(e, &oom) == nil {
		delete(q.ooms, oom.ContainerID)
	}
	q.sent++
	if drop := q.sent - Replay; drop > 0 {
		clear(q.events[:drop])
		q.events = q.events[drop:]
		q.sent = Replay
	}
}
