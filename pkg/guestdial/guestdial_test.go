//go:build linux

package guestdial_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/guestdial"
	"github.com/vmrt/vmrt/pkg/vsock"
)

// patience bounds what a test waits for; nothing waits that long when it works.
const patience = 20 * time.Second

// agent is an agent's end of each connection, on a Unix socket.
type agent struct {
	addr string
	port uint32 // the last that was dialled
}

func (a *agent) Dial(ctx context.Context, port uint32) (vsock.Conn, error) {
	a.port = port
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", a.addr)
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}

func newAgent(t *testing.T, serve func(net.Conn)) *agent {
	t.Helper()
	addr := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", addr)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serve(c)
			c.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-served
	})
	return &agent{addr: addr}
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func TestDial(t *testing.T) {
	a := newAgent(t, func(c net.Conn) {
		_, to, err := api.ReadDialRequest(c)
		if to != netip.MustParseAddrPort("[::1]:8080") || err != nil {
			t.Errorf("request = %s, %v; want [::1]:8080", to, err)
		}
		api.WriteDialAnswer(c, nil)
		io.Copy(c, c)
	})
	ctx, cancel := context.WithCancel(testContext(t))
	c, err := guestdial.Dial(ctx, a, "tcp6", 8080)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	cancel() // of no concern to the connection
	if a.port != api.PortDial {
		t.Errorf("vsock port = %d; want %d", a.port, api.PortDial)
	}
	io.WriteString(c, "over")
	c.CloseWrite()
	if got, err := io.ReadAll(c); string(got) != "over" || err != nil {
		t.Errorf("echo = %q, %v; want %q", got, err, "over")
	}
}

func TestFailures(t *testing.T) {
	for _, tc := range []struct {
		name    string
		serve   func(net.Conn)
		network string
		want    string
		refused bool
	}{
		{"refused", func(c net.Conn) { api.WriteDialAnswer(c, syscall.ECONNREFUSED) }, "tcp4",
			"dial guest 127.0.0.1:80: connection refused", true},
		{"failed", func(c net.Conn) { api.WriteDialAnswer(c, errors.New("too many connections")) }, "tcp4",
			`dial guest 127.0.0.1:80: the other side says "too many connections"`, false},
		{"nonsense", func(c net.Conn) { io.WriteString(c, "?") }, "tcp4",
			"dial guest 127.0.0.1:80: answer 0x3f is unknown", false},
		{"cut", func(c net.Conn) { io.WriteString(c, "e\x09abc") }, "tcp4",
			"dial guest 127.0.0.1:80: read answer: unexpected EOF", false},
		{"network", func(net.Conn) {}, "udp",
			`dial guest by network "udp": want tcp4 or tcp6`, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := newAgent(t, func(c net.Conn) {
				if _, _, err := api.ReadDialRequest(c); err == nil {
					tc.serve(c)
				}
			})
			c, err := guestdial.Dial(testContext(t), a, tc.network, 80)
			if c != nil {
				t.Errorf("Dial() = %v; want no connection", c)
			}
			if err == nil || err.Error() != tc.want || errors.Is(err, syscall.ECONNREFUSED) != tc.refused {
				t.Errorf("Dial() = %v; want %s", err, tc.want)
			}
		})
	}
}

// An agent that is away is not a port that nobody listens on.
func TestNoAgent(t *testing.T) {
	_, err := guestdial.Dial(testContext(t), &agent{addr: filepath.Join(t.TempDir(), "none")}, "tcp4", 80)
	if err == nil || !strings.Contains(err.Error(), "reach the agent") || errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("Dial() without an agent = %v; want that it cannot be reached", err)
	}
}

func TestDeafAgent(t *testing.T) {
	end := make(chan struct{})
	asked := make(chan struct{}, 1)
	a := newAgent(t, func(c net.Conn) {
		api.ReadDialRequest(c)
		asked <- struct{}{}
		<-end
	})
	defer close(end)
	ctx, cancel := context.WithCancelCause(testContext(t))
	cause := errors.New("the pod ends")
	go func() {
		<-asked
		cancel(cause)
	}()
	if _, err := guestdial.Dial(ctx, a, "tcp4", 80); !errors.Is(err, cause) {
		t.Errorf("Dial() of a deaf agent = %v; want %v", err, cause)
	}
}
