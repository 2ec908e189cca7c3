// Package streaming serves containerd's streaming service
// (containerd.services.streaming.v1) for the standard streams of processes, as
// containerd's CRI uses it with `io_type = "streaming"`: instead of opening a
// FIFO, a client opens a stream by its id over the shim's own socket, and the
// process is created with a URI that names the id.
//
// The contract:
//
//   - A client and the process may come in either order. A stream belongs to
//     one process at a time, and to the client that came last: a client that
//     was there before is ended. So a containerd that has restarted takes up
//     its streams again.
//   - While no client is there, and while a client does not read, an Output
//     waits and holds up its writer. Nothing is dropped. Closing discards.
//   - A client reads the end of an Output after the last byte, even one that
//     comes after the end.
//   - An Input ends when the process's owner has said so and no client is
//     left, after all that clients have sent.
//
// On the wire a stream is that of containerd's core/transfer/streaming: the
// first message is StreamInit, which is answered by an empty one; then go Data
// one way and WindowUpdate, which allows that many bytes more, the other way.
//
// All methods may be used from any goroutine, but an Output has one writer.
//
// Not guaranteed: that bytes which were sent to a client have been read by it.
// What a client leaves unread when it dies, at most the 128 KiB that it has
// allowed, is lost with it.
package streaming

import (
	"context"
	"fmt"
	"sync"
	"time"

	api "github.com/containerd/containerd/api/services/streaming/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
)

// limits are the package's bounds.
type limits struct {
	// init is how long a client may take to say which stream it opens.
	init time.Duration
	// unclaimed is how many clients may wait for a process to name their
	// stream, and wait for how long. CRI opens the streams when it creates a
	// container, and the process comes when it starts it: any time later.
	unclaimed int
	wait      time.Duration
	// farewell is how long Finish waits for a client that has got the end to
	// close its connection.
	farewell time.Duration
	// seeOff is how long a client that has ended a stream has for the same.
	seeOff time.Duration
	// spacing is the time between small messages to a client that may not be
	// reading; see client.pause.
	spacing time.Duration
}

var defaultLimits = limits{
	init:      10 * time.Second,
	unclaimed: 512,
	wait:      24 * time.Hour,
	farewell:  500 * time.Millisecond,
	seeOff:    100 * time.Millisecond,
	spacing:   25 * time.Millisecond,
}

// Service has all streams of one shim.
type Service struct {
	address string
	limits  limits

	mu sync.Mutex
	// streams are those that a process has claimed, or a client has joined.
	streams map[string]*stream
	// unclaimed is the number of clients on streams without a process.
	unclaimed int
}

var _ api.TTRPCStreamingService = (*Service)(nil)

// New returns a service without streams. socket is the path of the socket that
// it is reached by; URIs that name another are refused. With an empty path all
// are.
func New(socket string) *Service {
	return &Service{address: socket, limits: defaultLimits, streams: map[string]*stream{}}
}

// Register makes the service reachable.
func (s *Service) Register(server *ttrpc.Server) {
	api.RegisterTTRPCStreamingService(server, s)
}

// Output claims the stream id for what a process writes. The error is
// errdefs.ErrAlreadyExists while it is claimed already.
func (s *Service) Output(id string) (*Output, error) {
	st, err := s.claim(id, false)
	if err != nil {
		return nil, err
	}
	return &Output{service: s, stream: st}, nil
}

// Input claims the stream id for what a process reads. The error is
// errdefs.ErrAlreadyExists while it is claimed already.
func (s *Service) Input(id string) (*Input, error) {
	st, err := s.claim(id, true)
	if err != nil {
		return nil, err
	}
	st.grant()
	return &Input{service: s, stream: st}, nil
}

func (s *Service) claim(id string, input bool) (*stream, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.find(id)
	if st.claimed {
		return nil, fmt.Errorf("stream %s belongs to another process: %w", id, errdefs.ErrAlreadyExists)
	}
	st.claimed = true
	s.unclaimed -= st.joined
	st.begin(input)
	return st, nil
}

// find returns the stream, which is new if there was none. s.mu is held.
func (s *Service) find(id string) *stream {
	st := s.streams[id]
	if st == nil {
		st = newStream(id, s.limits)
		s.streams[id] = st
	}
	return st
}

// release ends a claim. A client that comes later waits for the next process.
func (s *Service) release(st *stream) {
	s.mu.Lock()
	if s.streams[st.id] == st {
		delete(s.streams, st.id)
	}
	s.mu.Unlock()
	st.close()
}

// join adds a client to the stream that it names.
func (s *Service) join(id string) (*stream, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st := s.streams[id]; (st == nil || !st.claimed) && s.unclaimed >= s.limits.unclaimed {
		return nil, fmt.Errorf("stream %s: %d streams wait for a process already: %w", id, s.unclaimed, errdefs.ErrResourceExhausted)
	}
	st := s.find(id)
	st.joined++
	if !st.claimed {
		s.unclaimed++
	}
	return st, nil
}

// leave takes a client from its stream.
func (s *Service) leave(st *stream, c *client) {
	st.leave(c)
	s.mu.Lock()
	defer s.mu.Unlock()
	st.joined--
	if st.claimed {
		return
	}
	s.unclaimed--
	if st.joined == 0 && s.streams[st.id] == st {
		delete(s.streams, st.id)
	}
}

// isClaimed reports whether a process has named the stream.
func (s *Service) isClaimed(st *stream) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return st.claimed
}

// Stream is the RPC: one client on one stream, to its end.
func (s *Service) Stream(ctx context.Context, srv api.TTRPCStreaming_StreamServer) error {
	return errgrpc.ToGRPC(s.serve(ctx, srv))
}

func (s *Service) serve(ctx context.Context, srv api.TTRPCStreaming_StreamServer) error {
	id, err := s.awaitInit(srv)
	if err != nil {
		return err
	}
	st, err := s.join(id)
	if err != nil {
		return err
	}
	c := newClient(ctx, srv)
	defer s.leave(st, c)
	// A client that has got the answer has the stream.
	st.enter(c)
	if err := srv.Send(acknowledgement); err != nil {
		return err
	}
	go c.receive(st)
	st.start(c)

	expired := time.NewTimer(s.limits.wait)
	defer expired.Stop()
	for {
		select {
		case <-c.end:
			return c.err
		case <-c.left:
			s.seeOff(st, c)
			return c.fault
		case <-expired.C:
			if !s.isClaimed(st) {
				return fmt.Errorf("stream %s: no process has named it for %v: %w", id, s.limits.wait, context.DeadlineExceeded)
			}
		}
	}
}

// seeOff gives a client that has ended the stream time to close its connection:
// ttrpc logs an error when it cannot send the answer.
func (s *Service) seeOff(st *stream, c *client) {
	st.leave(c)
	timer := time.NewTimer(s.limits.seeOff)
	defer timer.Stop()
	select {
	case <-c.ctx.Done():
	case <-c.end:
	case <-timer.C:
	}
}

// awaitInit returns the id of a client's first message. Returning ends the RPC
// and with it a Recv that still waits.
func (s *Service) awaitInit(srv api.TTRPCStreaming_StreamServer) (string, error) {
	type result struct {
		id  string
		err error
	}
	received := make(chan result, 1)
	go func() {
		id, err := receiveInit(srv)
		received <- result{id, err}
	}()
	timer := time.NewTimer(s.limits.init)
	defer timer.Stop()
	select {
	case r := <-received:
		return r.id, r.err
	case <-timer.C:
		return "", fmt.Errorf("open stream: client has not named it within %v: %w", s.limits.init, context.DeadlineExceeded)
	}
}
