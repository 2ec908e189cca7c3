package sandbox

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmrt/vmrt/api"
)

// lyingAgent answers every request with its error.
type lyingAgent struct {
	api.AgentService
	err error
}

func (a lyingAgent) Events(context.Context, *api.Empty, api.Agent_EventsServer) error { return a.err }

type lyingTasks struct {
	taskapi.TTRPCTaskService
	err error
}

func (a lyingTasks) State(context.Context, *taskapi.StateRequest) (*taskapi.StateResponse, error) {
	return nil, a.err
}

// dialAgent returns a sandbox without a machine that is connected to an agent which
// answers everything with an error.
func dialAgent(t *testing.T, answer error) *Sandbox {
	t.Helper()
	return agentOf(t, lyingAgent{err: answer}, lyingTasks{err: answer})
}

// agentOf returns a sandbox without a machine that is connected to an agent.
func agentOf(t *testing.T, agent api.AgentService, tasks ...taskapi.TTRPCTaskService) *Sandbox {
	t.Helper()
	host, guest := net.Pipe()
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	api.RegisterAgentService(server, agent)
	for _, s := range tasks {
		taskapi.RegisterTTRPCTaskService(server, s)
	}
	go server.Serve(t.Context(), &once{conn: guest, done: t.Context().Done()})
	t.Cleanup(func() { server.Close() })
	return connected(t, host, requestTimeout)
}

// connected is a sandbox without a machine that has an RPC connection.
func connected(t *testing.T, conn net.Conn, timeout time.Duration) *Sandbox {
	t.Helper()
	s := &Sandbox{dead: make(chan struct{}), agentGone: make(chan struct{})}
	s.rpc = newRPC(conn, timeout, func(fault error) {
		s.agentFault = fault
		close(s.agentGone)
	})
	t.Cleanup(func() { s.rpc.Close() })
	return s
}

// once is a listener of one connection.
type once struct {
	conn net.Conn
	done <-chan struct{}
}

func (o *once) Accept() (net.Conn, error) {
	if c := o.conn; c != nil {
		o.conn = nil
		return c, nil
	}
	<-o.done
	return nil, net.ErrClosed
}
func (o *once) Close() error { return nil }
func (*once) Addr() net.Addr { return &net.UnixAddr{} }

// nested is an error that has an error in its details, which has one, and so
// on.
func nested(t *testing.T, depth int) error {
	t.Helper()
	p := &spb.Status{Code: int32(codes.NotFound), Message: "innermost"}
	for range depth {
		a, err := anypb.New(p)
		if err != nil {
			t.Fatal(err)
		}
		p = &spb.Status{Code: int32(codes.NotFound), Message: "task not found", Details: []*anypb.Any{a}}
	}
	return status.ErrorProto(p)
}

func TestAgentErrors(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  error
		kind error
		want string
	}{
		{"plain", errgrpc.ToGRPC(fmt.Errorf("exec “ü” failed:\n\tno: %w", errdefs.ErrNotFound)), errdefs.ErrNotFound, "exec “ü” failed:\n\tno: not found"},
		{"escape sequences", status.Error(codes.Unknown, "a\x1b[2Jb\rc\x00\u009bd\u202ee"), errdefs.ErrUnknown, "a?[2Jb?c??d?e"},
		{"long", status.Error(codes.Internal, strings.Repeat("x", 5000)), errdefs.ErrInternal, strings.Repeat("x", maxErrorText) + "…"},
		{"cut in a rune", status.Error(codes.Internal, strings.Repeat("x", maxErrorText-1)+"ü"), errdefs.ErrInternal, strings.Repeat("x", maxErrorText-1) + "?…"},
		{"details of details", nested(t, 500), errdefs.ErrNotFound, "task not found"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := dialAgent(t, tt.err)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			_, err := s.Tasks().State(ctx, &taskapi.StateRequest{ID: "c"})
			err = errgrpc.ToNative(err)
			got := strings.TrimSuffix(err.Error(), ": "+tt.kind.Error())
			if want := strings.TrimSuffix(tt.want, ": "+tt.kind.Error()); got != want || !errors.Is(err, tt.kind) {
				t.Errorf("error of a request = %.200q; want %.200q of kind %v", err, want, tt.kind)
			}
			err = s.Events(ctx, func(*api.Event) {})
			if err == nil || len(err.Error()) > maxErrorText+100 || strings.Contains(err.Error(), "innermost") || strings.Contains(err.Error(), "\x1b") {
				t.Errorf("error of a stream = %.200q; want it bounded", err)
			}
		})
	}
}

// A message that is too long is not read.
func TestAgentSendsTooMuch(t *testing.T) {
	s := dialAgent(t, status.Error(codes.Internal, strings.Repeat("x", maxMessage)))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := s.Tasks().State(ctx, &taskapi.StateRequest{ID: "c"}); err == nil || ctx.Err() != nil {
		t.Errorf("State() = %v; want an error at once", err)
	}
	select {
	case <-s.agentGone:
	case <-ctx.Done():
		t.Fatal("the connection goes on")
	}
	if s.agentFault == nil || !strings.Contains(s.agentFault.Error(), fmt.Sprintf("at most %d", maxMessage)) {
		t.Errorf("fault = %v; want the limit in it", s.agentFault)
	}
}

// An agent that reads no requests holds up none of the host's for longer than
// it may, whatever their own deadlines are: the connection ends.
func TestAgentDoesNotRead(t *testing.T) {
	host, guest := net.Pipe()
	defer guest.Close()
	s := connected(t, host, 100*time.Millisecond)
	begin := time.Now()
	answers := make(chan error)
	const requests = 3
	for range requests {
		go func() {
			_, err := s.Tasks().Kill(t.Context(), &taskapi.KillRequest{ID: "c", Signal: 9})
			answers <- err
		}()
	}
	for range requests {
		select {
		case err := <-answers:
			if err == nil {
				t.Error("Kill() = nil; want an error")
			}
		case <-time.After(30 * time.Second):
			t.Fatal("a request waits for ever")
		}
	}
	select {
	case <-s.agentGone:
	case <-time.After(30 * time.Second):
		t.Fatal("the connection goes on")
	}
	if s.agentFault == nil || !strings.Contains(s.agentFault.Error(), "has not read a request within 100ms") {
		t.Errorf("fault = %v after %v; want that it does not read", s.agentFault, time.Since(begin))
	}
}

// Lengths are found however the stream is cut into pieces.
func TestFrames(t *testing.T) {
	message := func(n uint32) []byte {
		b := append(binary.BigEndian.AppendUint32(nil, n), 0, 0, 0, 1, 2, 0)
		return append(b, make([]byte, min(n, 300))...)
	}
	good := slices.Concat(message(0), message(1), message(300), message(299), message(0))
	for _, piece := range []int{1, 2, 3, 9, 10, 11, 100, 1000} {
		f := &frames{}
		feed := func(b []byte) error {
			for p := range slices.Chunk(b, piece) {
				if err := f.follow(p); err != nil {
					return err
				}
			}
			return nil
		}
		if err := feed(good); err != nil {
			t.Errorf("in pieces of %d: %v; want nil", piece, err)
		}
		if err := feed(message(maxMessage + 1)); err == nil {
			t.Errorf("in pieces of %d: no error for a message of %d bytes", piece, maxMessage+1)
		}
	}
}
