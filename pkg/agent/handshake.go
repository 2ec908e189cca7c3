package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/containerd/log"
	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/agent/clock"
	"github.com/vmrt/vmrt/pkg/agent/entropy"
)

const (
	// dialTimeout bounds the attempts to reach the host.
	dialTimeout = 20 * time.Second
	// dialRetry is the pause between two of them.
	dialRetry = 5 * time.Millisecond
	// handshakeTimeout bounds each message of the handshake.
	handshakeTimeout = 30 * time.Second
)

// dialHost connects to the host's port. The device may still be starting, so
// it tries for a while.
func dialHost(port uint32) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	for {
		c, err := vsock.DialContext(ctx, vsock.Host, port, nil)
		if err == nil {
			return c, nil
		}
		select {
		case <-time.After(dialRetry):
		case <-ctx.Done():
			return nil, fmt.Errorf("dial the host at port %d: %w", port, err)
		}
	}
}

// sayHello tells the host that the guest is ready.
func sayHello(host net.Conn, version string) error {
	kernel, err := release()
	if err != nil {
		return fmt.Errorf("say hello: %w", err)
	}
	host.SetWriteDeadline(time.Now().Add(handshakeTimeout))
	err = api.WriteMessage(host, &api.Hello{
		Protocol: api.ProtocolVersion,
		Version:  version,
		Kernel:   kernel,
		Time:     timestamppb.Now(),
	})
	if err != nil {
		return fmt.Errorf("say hello: %w", err)
	}
	return nil
}

// release returns `uname -r`.
func release() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", fmt.Errorf("uname: %w", err)
	}
	name, _, _ := bytes.Cut(u.Release[:], []byte{0})
	return string(name), nil
}

// readWelcome does what the host's answer says.
func readWelcome(host net.Conn) error {
	host.SetReadDeadline(time.Now().Add(handshakeTimeout))
	var w api.Welcome
	if err := api.ReadMessage(host, &w); err != nil {
		return fmt.Errorf("welcome: %w", err)
	}
	host.SetDeadline(time.Time{})
	if w.Refused != "" {
		return fmt.Errorf("the host refuses this guest: %s", w.Refused)
	}
	return applyWelcome(&w)
}

func applyWelcome(w *api.Welcome) error {
	var errs []error
	if w.Time.IsValid() {
		errs = append(errs, clock.Set(w.Time.AsTime()))
	}
	if len(w.Seed) > 0 {
		errs = append(errs, entropy.Add(w.Seed))
	}
	if w.Hostname != "" {
		if err := unix.Sethostname([]byte(w.Hostname)); err != nil {
			errs = append(errs, fmt.Errorf("set host name %q: %w", w.Hostname, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("welcome: %w", err)
	}
	return nil
}

// hostGone delivers the end of the connection that the handshake was on.
func hostGone(host net.Conn) <-chan error {
	gone := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, host)
		if err == nil {
			err = io.EOF
		}
		gone <- err
	}()
	return gone
}

// followHostClock keeps the clock right where the machine shows the host's.
// Elsewhere the host corrects it by the Clock call.
func followHostClock() {
	c, err := clock.OpenHostClock()
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	if err != nil {
		log.L.WithError(err).Warn("open the host's clock")
		return
	}
	go func() {
		defer c.Close()
		err := clock.Follow(context.Background(), c)
		log.L.WithError(err).Warn("the host's clock is not followed any more")
	}()
}
