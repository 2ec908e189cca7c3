package streaming

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/services/streaming/v1"
	transferapi "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/containerd/v2/core/streaming/proxy"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

func TestUnclaimedAreBounded(t *testing.T) {
	s := serve(t, func(l *limits) { l.unclaimed = 3 })
	a, b, c := s.open("a"), s.open("b"), s.open("c")
	_, err := proxy.NewStreamCreator(s.dial()).Create(s.context(), "d")
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "stream d: 3 streams wait") {
		t.Errorf("fourth stream = %v; want resource exhausted", err)
	}
	// A client that comes to a process is not counted, and those that leave
	// make room.
	o := s.output("e")
	e := s.open("e")
	a.Close()
	eventually(t, "room", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.unclaimed < 3 })
	d := s.open("d")
	in := s.input("b")
	f := s.open("f")
	for _, st := range []interface{ Close() error }{b, c, d, e, f} {
		st.Close()
	}
	o.Close()
	in.Close()
}

func TestNoProcessComes(t *testing.T) {
	s := serve(t, func(l *limits) { l.wait = 30 * time.Millisecond })
	st := s.open("a")
	_, err := st.Recv()
	if want := "stream a: no process has named it for 30ms"; err == nil || !strings.Contains(err.Error(), want) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("client read %v; want a deadline exceeded: %s", err, want)
	}
	st.Close()
	// One that was claimed stays.
	o := s.output("b")
	r := s.reader("b")
	time.Sleep(60 * time.Millisecond) // twice the limit
	result(t, "Write", write(o, []byte("x")))
	readString(t, r, "x")
	r.Close()
}

func TestNoInit(t *testing.T) {
	s := serve(t, func(l *limits) { l.init = 20 * time.Millisecond })
	_, err := s.call().Recv()
	if want := "client has not named it within 20ms"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("client read %v; want %s", err, want)
	}
}

func encode(t testing.TB, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := typeurl.MarshalAnyToProto(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestProtocolErrors(t *testing.T) {
	s := serve(t, nil)
	s.output("out")
	s.input("in")
	init := func(id string) *anypb.Any { return encode(t, &api.StreamInit{ID: id}) }
	data := func(n int) *anypb.Any { return encode(t, &transferapi.Data{Data: make([]byte, n)}) }
	update := func(n int32) *anypb.Any { return encode(t, &transferapi.WindowUpdate{Update: n}) }
	garbage := encode(t, &transferapi.Data{})
	garbage.Value = []byte{0xff}
	for _, tc := range []struct {
		name string
		send []*anypb.Any
		want string
	}{
		{"no id", []*anypb.Any{init("")}, "open stream: no streaming_id"},
		{"long id", []*anypb.Any{init(strings.Repeat("x", maxID+1))}, "open stream: streaming_id of 1025 bytes"},
		{"no init", []*anypb.Any{update(1)}, "open stream: first message is containerd.types.transfer.WindowUpdate, not containerd.services.streaming.v1.StreamInit"},
		{"unknown init", []*anypb.Any{{TypeUrl: "x"}}, `open stream: message of type "x"`},
		{"two inits", []*anypb.Any{init("a"), init("a")}, "stream a: second containerd.services.streaming.v1.StreamInit"},
		{"unknown message", []*anypb.Any{init("a"), {TypeUrl: "type.googleapis.com/y"}}, `stream a: message of type "y"`},
		{"garbage", []*anypb.Any{init("a"), garbage}, "stream a: decode containerd.types.transfer.Data"},
		{"data without a process", []*anypb.Any{init("a"), data(1)}, "client has sent 1 bytes when it may send 0"},
		{"data to an output", []*anypb.Any{init("out"), data(1)}, "client has sent 1 bytes when it may send 0"},
		{"too much", []*anypb.Any{init("in"), data(window + 1)}, "client has sent 32769 bytes when it may send"},
		{"negative window", []*anypb.Any{init("out"), update(-1)}, "stream out: WindowUpdate of -1"},
		{"empty window", []*anypb.Any{init("out"), update(0)}, "stream out: WindowUpdate of 0"},
		{"endless window", []*anypb.Any{init("out"), update(1<<31 - 1), update(1)}, "window of 2147483648 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			st := s.call()
			for _, m := range tc.send {
				if err := st.Send(m); err != nil {
					t.Fatal(err)
				}
			}
			var err error
			for err == nil {
				_, err = st.Recv()
			}
			err = errgrpc.ToNative(err)
			if !strings.Contains(err.Error(), tc.want) || !errdefs.IsInvalidArgument(err) {
				t.Errorf("client read %v; want an invalid argument: %s", err, tc.want)
			}
		})
	}
}

// A prefix that other protobuf libraries write is as good.
func TestTypePrefix(t *testing.T) {
	a := encode(t, &transferapi.WindowUpdate{Update: 7})
	a.TypeUrl = "type.googleapis.com/" + a.TypeUrl
	m, err := decode(a)
	if err != nil || m.(*transferapi.WindowUpdate).Update != 7 {
		t.Errorf("decode() = %v, %v; want the update", m, err)
	}
}

func FuzzDecode(f *testing.F) {
	for _, m := range []proto.Message{&transferapi.Data{Data: []byte("x")}, &transferapi.WindowUpdate{Update: 1}, &api.StreamInit{ID: "a"}} {
		a := encode(f, m)
		f.Add(a.TypeUrl, a.Value)
	}
	f.Fuzz(func(t *testing.T, name string, value []byte) {
		st := newStream("a", defaultLimits)
		st.begin(true)
		c := &client{granted: window}
		st.client = c
		if err := st.message(c, &anypb.Any{TypeUrl: name, Value: value}); err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("message() = %v; want an invalid argument", err)
		}
		if len(st.buf)+c.granted != window || c.credit < 0 {
			t.Errorf("%d bytes taken, %d allowed, credit %d", len(st.buf), c.granted, c.credit)
		}
	})
}
