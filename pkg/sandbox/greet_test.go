package sandbox

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/vhostuser/vsock/vsocktest"
	"github.com/vmrt/vmrt/pkg/vsock"
)

// greeting is a sandbox without a machine, whose guest's driver is the test's.
func greeting(t *testing.T) (*Sandbox, *vsocktest.Guest) {
	t.Helper()
	tr, err := vsock.Open(vsock.VhostUser)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tr.Close() })
	backend := tr.Device().Backend
	defer backend.Close()
	conn, err := net.FileConn(backend)
	if err != nil {
		t.Fatal(err)
	}
	g, err := vsocktest.New(conn.(*net.UnixConn), vsocktest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return &Sandbox{transport: tr, dead: make(chan struct{})}, g
}

func TestGreet(t *testing.T) {
	hello := func(c *vsocktest.Conn) error {
		return api.WriteMessage(c, &api.Hello{Protocol: api.ProtocolVersion, Version: "test", Kernel: "6.12-test"})
	}
	// What the guest does on one connection after the other.
	tests := map[string]struct {
		guest []func(c *vsocktest.Conn) error
		want  []string // in the error; none: no error
	}{
		"at once":                {guest: []func(*vsocktest.Conn) error{hello}},
		"after a reset":          {guest: []func(*vsocktest.Conn) error{(*vsocktest.Conn).Reset, hello}},
		"after a close":          {guest: []func(*vsocktest.Conn) error{(*vsocktest.Conn).Close, hello}},
		"after several of both":  {guest: []func(*vsocktest.Conn) error{(*vsocktest.Conn).Close, (*vsocktest.Conn).Reset, (*vsocktest.Conn).Reset, hello}},
		"silent and never again": {guest: []func(*vsocktest.Conn) error{(*vsocktest.Conn).Reset}, want: []string{"wait for agent", "gave up", "connection reset"}},
		"of another protocol": {
			guest: []func(*vsocktest.Conn) error{func(c *vsocktest.Conn) error {
				if err := api.WriteMessage(c, &api.Hello{Protocol: api.ProtocolVersion + 1, Version: "v9\x1b[2J"}); err != nil {
					return err
				}
				welcome := &api.Welcome{}
				if err := api.ReadMessage(c, welcome); err != nil {
					return err
				}
				if len(welcome.Seed) > 0 || !strings.Contains(welcome.Refused, "install shim and guest files of one release") {
					return fmt.Errorf("the agent is told %v; want that it is refused", welcome)
				}
				return nil
			}},
			want: []string{`agent "v9?[2J"`, fmt.Sprintf("speaks protocol %d, this shim", api.ProtocolVersion+1), fmt.Sprintf(") %d: install", api.ProtocolVersion), "failed precondition"},
		},
		"cut short, then complete": {guest: []func(*vsocktest.Conn) error{cutShort, hello}, want: []string{"agent's hello", "connection reset"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s, g := greeting(t)
			wait := 10 * time.Second
			if name == "silent and never again" {
				wait = 200 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), wait)
			defer cancel()
			guest := make(chan error, 1)
			go func() {
				for _, f := range tt.guest {
					c, err := g.Dial(ctx, s.transport.HostPort())
					if err == nil {
						err = f(c)
					}
					if err != nil {
						guest <- err
						return
					}
				}
				guest <- nil
			}()
			err := s.greet(ctx)
			if err := <-guest; err != nil {
				t.Fatal(err)
			}
			if len(tt.want) == 0 {
				if err != nil || s.hello == nil || s.Info().Release != "6.12-test" {
					t.Errorf("greet() = %v, release %q; want nil, 6.12-test", err, s.Info().Release)
				}
				return
			}
			for _, want := range tt.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("greet() = %v; want an error with %q", err, want)
				}
			}
		})
	}
}

// cutShort resets a connection in the middle of a message.
func cutShort(c *vsocktest.Conn) error {
	if _, err := c.Write([]byte{0, 0}); err != nil {
		return err
	}
	return c.Reset()
}
