package streaming

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	api "github.com/containerd/containerd/api/services/streaming/v1"
	transferapi "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
)

// maxData is the most that one message carries, in bytes: as much as
// containerd's own end sends.
const maxData = 32 << 10

// typeURL is what containerd's typeurl calls a message.
func typeURL(m proto.Message) string { return string(m.ProtoReflect().Descriptor().FullName()) }

var (
	dataType = typeURL(&transferapi.Data{})
	// acknowledgement is the answer to StreamInit.
	acknowledgement = &anypb.Any{TypeUrl: typeURL(&emptypb.Empty{})}
)

// buffers are for the encoding of Data: content, a tag and a length.
var buffers = sync.Pool{New: func() any {
	b := make([]byte, 0, maxData+16)
	return &b
}}

// sendData sends one message and does not keep p.
func sendData(srv api.TTRPCStreaming_StreamServer, p []byte) error {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	b, err := proto.MarshalOptions{}.MarshalAppend((*buf)[:0], &transferapi.Data{Data: p})
	if err != nil {
		return err
	}
	*buf = b
	return srv.Send(&anypb.Any{TypeUrl: dataType, Value: b})
}

func sendWindow(srv api.TTRPCStreaming_StreamServer, n int) error {
	m := &transferapi.WindowUpdate{Update: int32(n)}
	b, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	return srv.Send(&anypb.Any{TypeUrl: typeURL(m), Value: b})
}

// receiveInit reads a client's first message.
func receiveInit(srv api.TTRPCStreaming_StreamServer) (string, error) {
	a, err := srv.Recv()
	if errors.Is(err, io.EOF) {
		return "", fmt.Errorf("open stream: client has ended it at once: %w", errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return "", fmt.Errorf("open stream: %w", err)
	}
	m, err := decode(a)
	if err != nil {
		return "", fmt.Errorf("open stream: %w", err)
	}
	init, ok := m.(*api.StreamInit)
	if !ok {
		return "", fmt.Errorf("open stream: first message is %s, not %s: %w", typeURL(m), typeURL(init), errdefs.ErrInvalidArgument)
	}
	if err := checkID(init.ID); err != nil {
		return "", fmt.Errorf("open stream: %w", err)
	}
	return init.ID, nil
}

// decode returns a StreamInit, Data or WindowUpdate; nothing else may come.
func decode(a *anypb.Any) (proto.Message, error) {
	name := a.GetTypeUrl()
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		name = name[i+1:]
	}
	for _, m := range []proto.Message{&transferapi.Data{}, &transferapi.WindowUpdate{}, &api.StreamInit{}} {
		if typeURL(m) != name {
			continue
		}
		if err := proto.Unmarshal(a.GetValue(), m); err != nil {
			return nil, fmt.Errorf("decode %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
		}
		return m, nil
	}
	return nil, fmt.Errorf("message of type %.100q: %w", name, errdefs.ErrInvalidArgument)
}
