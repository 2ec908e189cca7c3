package qmp

import (
	"context"
	"errors"
	"slices"
)

// queuedEvents is how many events a subscription holds for a slow receiver.
const queuedEvents = 64

// ErrOverrun ends a subscription whose receiver was too slow: rather than
// losing an event that somebody waits for.
var ErrOverrun = errors.New("events came faster than they were received")

// Subscription receives the events that it was made for.
type Subscription struct {
	c      *Client
	names  []string
	events chan Event
	err    error // guarded by c.mu
}

// Subscribe returns a subscription to the events called names, or to all if
// there are none. Made before Handshake, it misses no event. The caller closes
// it.
func (c *Client) Subscribe(names ...string) *Subscription {
	s := &Subscription{c: c, names: slices.Clone(names), events: make(chan Event, queuedEvents)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.subscriptions == nil {
		s.close(c.err)
	} else {
		c.subscriptions[s] = struct{}{}
	}
	return s
}

// Events returns the channel of events. It is closed when the subscription has
// ended; Err says why.
func (s *Subscription) Events() <-chan Event { return s.events }

// Next waits for an event.
func (s *Subscription) Next(ctx context.Context) (Event, error) {
	select {
	case ev, ok := <-s.events:
		if !ok {
			return Event{}, s.Err()
		}
		return ev, nil
	case <-ctx.Done():
		return Event{}, context.Cause(ctx)
	}
}

// Err says why the subscription ended: ErrOverrun, ErrClosed, or the end of the
// connection. Nil while it lasts.
func (s *Subscription) Err() error {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.err
}

// Close ends the subscription. Idempotent.
func (s *Subscription) Close() {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	delete(s.c.subscriptions, s)
	s.close(ErrClosed)
}

// close is called with c.mu held, as is everything that sends to s.events.
func (s *Subscription) close(reason error) {
	if s.err == nil {
		s.err = reason
		close(s.events)
	}
}

// publish queues ev for its subscribers without waiting for any.
func (c *Client) publish(ev Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.subscriptions {
		if len(s.names) > 0 && !slices.Contains(s.names, ev.Name) {
			continue
		}
		select {
		case s.events <- ev:
		default:
			delete(c.subscriptions, s)
			s.close(ErrOverrun)
		}
	}
}
