package sandbox

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/containerd/ttrpc"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/status"
)

// What the agent answers is the guest's: the RPC library bounds a message at
// 4 MiB, keeps up to 64 of each stream that nobody has taken yet, and follows
// details of errors as deep as they go. The bounds here are far above what an
// agent has to say.
const (
	// maxMessage bounds a message, in bytes.
	maxMessage = 256 << 10
	// maxErrorText bounds the text of an error, in bytes.
	maxErrorText = 4 << 10
	// requestTimeout is how long an agent may take to read a request. The RPC
	// library holds up every other request meanwhile, whatever the contexts of
	// both say.
	requestTimeout = 15 * time.Second
)

// newRPC returns a client of the agent at the other end of conn, which must read
// each request within timeout. closed is called when the connection has ended,
// with the guest's fault if it has one.
func newRPC(conn net.Conn, timeout time.Duration, closed func(fault error)) *ttrpc.Client {
	f := &frames{Conn: conn, timeout: timeout}
	return ttrpc.NewClient(f,
		ttrpc.WithOnClose(func() { closed(f.Fault()) }),
		ttrpc.WithUnaryClientInterceptor(boundErrors))
}

// frames is a ttrpc connection whose peer may send messages of at most
// maxMessage bytes and must read what it is sent. Its first fault is the
// connection's end.
type frames struct {
	net.Conn
	timeout time.Duration // of a Write

	// Of the one reader: what is known of the header of the next message, and
	// how much of the present one is to come.
	header [10]byte
	known  int
	left   uint32

	mu    sync.Mutex
	fault error // guarded by mu
}

// Fault says what the peer did wrong.
func (f *frames) Fault() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fault
}

func (f *frames) Read(p []byte) (int, error) {
	n, err := f.Conn.Read(p)
	if fault := f.follow(p[:n]); fault != nil {
		f.blame(fault)
		return 0, fault
	}
	return n, err
}

func (f *frames) Write(p []byte) (int, error) {
	if err := f.Conn.SetWriteDeadline(time.Now().Add(f.timeout)); err != nil {
		return 0, err
	}
	n, err := f.Conn.Write(p)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		// The peer has a part of a message: nothing can follow.
		f.blame(fmt.Errorf("agent has not read a request within %v", f.timeout))
		f.Conn.Close()
	}
	return n, err
}

// blame notes what the peer did wrong. The first counts.
func (f *frames) blame(fault error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fault == nil {
		f.fault = fault
	}
}

// follow takes the next bytes of the stream. A message is a header of ten
// bytes, of which the first four are the length of what follows, big-endian
// (PROTOCOL.md of ttrpc).
func (f *frames) follow(b []byte) error {
	for len(b) > 0 {
		if f.left > 0 {
			n := min(uint32(len(b)), f.left)
			f.left -= n
			b = b[n:]
			continue
		}
		n := copy(f.header[f.known:], b)
		f.known += n
		b = b[n:]
		if f.known < len(f.header) {
			return nil
		}
		f.known = 0
		if f.left = binary.BigEndian.Uint32(f.header[:]); f.left > maxMessage {
			return fmt.Errorf("agent sent a message of %d bytes: at most %d", f.left, maxMessage)
		}
	}
	return nil
}

// boundErrors makes the agent's errors fit for a log and a terminal.
func boundErrors(ctx context.Context, r *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, invoke ttrpc.Invoker) error {
	err := invoke(ctx, r, resp)
	bound(resp.GetStatus())
	return fromGuest(err)
}

// fromGuest is boundErrors for the errors of streams.
func fromGuest(err error) error {
	st, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	p := st.Proto() // a copy
	bound(p)
	return status.ErrorProto(p)
}

// bound keeps an error's kind, and of its text what can be shown.
func bound(p *spb.Status) {
	if p == nil {
		return
	}
	p.Details = nil
	text := p.Message
	cut := len(text) > maxErrorText
	if cut {
		text = text[:maxErrorText]
	}
	text = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) || r == '\n' || r == '\t' {
			return r
		}
		return '?'
	}, strings.ToValidUTF8(text, "?"))
	if cut {
		text += "…"
	}
	p.Message = text
}
