package shim

import (
	"context"
	"strings"
	"sync"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/streaming"
)

// publishTimeout bounds one attempt to hand an event to containerd; the
// publisher retries by itself while containerd is away.
const publishTimeout = 30 * time.Second

// eventQueue hands events to containerd one after the other, in the order of
// send. It is unbounded, because the order must hold while containerd restarts
// and nothing may wait for it. What clients ask for bounds its length: of what a
// guest can announce by itself, guestEvent takes each once, and out-of-memory
// once a second.
type eventQueue struct {
	publisher events.Publisher
	wake      chan struct{}

	mu     sync.Mutex
	queued []any
	closed bool
	done   chan struct{}
}

// newEventQueue publishes in ctx's containerd namespace until close.
func newEventQueue(ctx context.Context, p events.Publisher) *eventQueue {
	q := &eventQueue{publisher: p, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go q.run(context.WithoutCancel(ctx))
	return q
}

// send never blocks.
func (q *eventQueue) send(e any) {
	q.mu.Lock()
	q.queued = append(q.queued, e)
	q.mu.Unlock()
	q.signal()
}

func (q *eventQueue) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// close publishes what is queued and ends the queue, or gives up with ctx.
func (q *eventQueue) close(ctx context.Context) error {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.signal()
	select {
	case <-q.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (q *eventQueue) run(ctx context.Context) {
	defer close(q.done)
	for range q.wake {
		for {
			q.mu.Lock()
			batch, closed := q.queued, q.closed
			q.queued = nil
			q.mu.Unlock()
			if len(batch) == 0 {
				if closed {
					return
				}
				break
			}
			for _, e := range batch {
				q.publish(ctx, e)
			}
		}
	}
}

func (q *eventQueue) publish(ctx context.Context, e any) {
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	topic := runtime.GetTopic(e)
	if err := q.publisher.Publish(ctx, topic, e); err != nil {
		log.G(ctx).WithError(err).WithField("topic", topic).Warn("publish event")
	}
}

// guestEvent takes one event of the guest's task service: the exit of a
// process changes its record, and the rest is passed on with the host's ids
// and pids in it. The guest is not trusted: what names no process that it was
// told of, or comes once more, is dropped.
func (s *service) guestEvent(ctx context.Context, ev *api.Event) {
	v, err := typeurl.UnmarshalAny(ev.GetEvent())
	if err != nil {
		log.G(ctx).WithError(err).WithField("topic", ev.GetTopic()).Warn("guest sent an event that cannot be decoded")
		return
	}
	switch e := v.(type) {
	case *eventstypes.TaskStart:
		if c := s.lookup(e.ContainerID); c != nil && c.init.takeStarted() {
			s.events.send(&eventstypes.TaskStart{ContainerID: c.id, Pid: c.pid()})
		}
	case *eventstypes.TaskExecStarted:
		if c := s.lookup(e.ContainerID); c != nil {
			if p := c.exec(e.ExecID); p != nil && p.takeStarted() {
				s.events.send(&eventstypes.TaskExecStarted{ContainerID: c.id, ExecID: p.id, Pid: c.pid()})
			}
		}
	case *eventstypes.TaskExit:
		s.guestExit(e)
	case *eventstypes.TaskOOM:
		if c := s.lookup(e.ContainerID); c != nil && c.init.inGuest() && c.takeOOM(time.Now()) {
			s.events.send(&eventstypes.TaskOOM{ContainerID: c.id})
		}
	case *eventstypes.TaskPaused, *eventstypes.TaskResumed, *eventstypes.TaskCreate,
		*eventstypes.TaskDelete, *eventstypes.TaskExecAdded:
		// The host announces these itself, when its own part is done as well.
	default:
		log.G(ctx).WithField("topic", ev.GetTopic()).Warn("guest sent an event that no task has")
	}
}

func (s *service) guestExit(e *eventstypes.TaskExit) {
	c := s.lookup(e.ContainerID)
	if c == nil {
		return
	}
	p := c.init
	if e.ID != c.id {
		p = c.exec(e.ID)
	}
	if p == nil || !p.takeExit() {
		return
	}
	at := exitTime(e.ExitedAt, time.Now())
	// The exit of init is a container's last event, so that none can overtake
	// it; that of an exec waits here, and not for long.
	switch {
	case p != c.init:
		if p.hasLogger() {
			p.flushLogger(execLoggerGrace)
		}
		// CRI reads the streams of an exec to their end.
		s.exited(c, p, e.ExitStatus, at)
	case p.hasLogger():
		go func() {
			p.flushLogger(drainTimeout)
			s.exited(c, p, e.ExitStatus, at)
		}()
	case p.hasStreams():
		go func() {
			p.settleStreams(drainTimeout)
			s.exited(c, p, e.ExitStatus, at)
		}()
	default:
		s.exited(c, p, e.ExitStatus, at)
	}
}

// execLoggerGrace is how long the report of an exec's exit waits for output
// that is on its way to a logging binary. A child that the exec leaves behind
// can hold its output for ever; init leaves none.
const execLoggerGrace = 200 * time.Millisecond

// hasLogger reports whether a logging binary takes the process's output.
func (p *process) hasLogger() bool { return strings.HasPrefix(p.stdio.Stdout, "binary") }

// flushLogger lets a logging binary have what the process wrote before its exit
// is reported: nerdctl's stops to read when Wait returns. A client's FIFO needs
// no such thing, as clients read to the end.
func (p *process) flushLogger(limit time.Duration) {
	io := p.getIO()
	if io == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if err := io.Drain(ctx); err != nil {
		log.L.WithError(err).WithField("container", p.stdio.ID).Debug("exit reported before all output was logged")
	}
}

// hasStreams reports whether clients of the streaming service take the
// process's output.
func (p *process) hasStreams() bool {
	return streaming.IsURI(p.stdio.Stdout) || streaming.IsURI(p.stdio.Stderr)
}

// settleStreams lets clients have what the process wrote before its exit is
// reported, when CRI ends its streams. Output that does not move is not waited
// for.
func (p *process) settleStreams(limit time.Duration) {
	io := p.getIO()
	if io == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	io.Settle(ctx)
}

// exited records and announces the end of a process, once.
func (s *service) exited(c *container, p *process, status uint32, at time.Time) {
	pid := c.pid()
	if !p.setExited(status, at) {
		return
	}
	id := p.id
	if p == c.init {
		id = c.id
		c.releasePid()
		s.saveState()
	}
	s.events.send(&eventstypes.TaskExit{
		ContainerID: c.id, ID: id, Pid: pid, ExitStatus: status, ExitedAt: timestamppb.New(at),
	})
}

// exitTime is the guest's time of an exit where it can be true: not in the
// future, and not long past.
func exitTime(guest *timestamppb.Timestamp, now time.Time) time.Time {
	const oldest = time.Minute
	t := guest.AsTime()
	if guest == nil || t.After(now) || now.Sub(t) > oldest {
		return now
	}
	return t
}
