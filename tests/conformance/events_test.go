package conformance

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/emptypb"
)

// events is a containerd that only takes events.
type events struct {
	mu  sync.Mutex
	all []any
	new chan struct{}
}

func (e *events) Forward(_ context.Context, r *eventsapi.ForwardRequest) (*emptypb.Empty, error) {
	v, err := typeurl.UnmarshalAny(r.GetEnvelope().GetEvent())
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.all = append(e.all, v)
	close(e.new)
	e.new = make(chan struct{})
	return &emptypb.Empty{}, nil
}

// list returns the events so far and a channel that is closed at the next.
func (e *events) list() ([]any, <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]any(nil), e.all...), e.new
}

// waitFor returns the first event that match accepts.
func waitFor[T any](t testing.TB, e *events, match func(T) bool) T {
	t.Helper()
	timeout := time.After(callTimeout)
	for {
		all, more := e.list()
		for _, ev := range all {
			if v, ok := ev.(T); ok && match(v) {
				return v
			}
		}
		select {
		case <-more:
		case <-timeout:
			var zero T
			t.Fatalf("no event %T came that matches; have %v", zero, describe(all))
		}
	}
}

func describe(all []any) string {
	var b strings.Builder
	for _, ev := range all {
		fmt.Fprintf(&b, "%T{%v} ", ev, ev)
	}
	return b.String()
}
