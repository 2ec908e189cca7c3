package agent_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vmrt/vmrt/guest"
	"github.com/vmrt/vmrt/pkg/guestdial"
	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/portforward"
)

// Ports of the guest's loopback in these tests.
const (
	port4      = 8004 // 127.0.0.1
	port6      = 8006 // ::1
	portReset  = 8009 // 127.0.0.1, resets
	portReport = 8010 // 127.0.0.1, reports
	portNone   = 8011
)

// loopbackPrograms are what dials and its benchmark run in containers.
func loopbackPrograms(t testing.TB) map[string]string {
	t.Helper()
	program, err := build("loopback", "./testdata/loopback")
	if err != nil {
		t.Fatal(err)
	}
	return map[string]string{"loopback": program}
}

// serveLoopback starts servers in containers that have the guest's network, and
// returns the lines of the one that reports.
func serveLoopback(t testing.TB, v *virtual) (reports *bufio.Reader) {
	t.Helper()
	c := connect(t, v)
	for _, args := range [][]string{
		{"loopback", "echo", fmt.Sprintf("127.0.0.1:%d", port4), fmt.Sprintf("[::1]:%d", port6)},
		{"loopback", "reset", fmt.Sprintf("127.0.0.1:%d", portReset)},
		{"loopback", "report", fmt.Sprintf("127.0.0.1:%d", portReport)},
	} {
		url, out := c.stream(t)
		ctr := c.prepare(t, args)
		ctr.mustCreate(streams{out: url})
		ctr.start("")
		reports = bufio.NewReader(out)
		if s, err := reports.ReadString('\n'); s != "ready\n" {
			t.Fatalf("%v says %q, %v; want ready", args, s, err)
		}
	}
	return reports
}

// forwarded makes a pod's network namespace whose loopback leads to the guest.
func forwarded(t testing.TB, v *virtual) *podns.Namespaces {
	t.Helper()
	needRoot(t)
	pod, err := podns.Open(podns.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pod.Close() })
	f, err := portforward.Start(testContext(t), pod, func(ctx context.Context, network string, port uint16) (portforward.Conn, error) {
		return guestdial.Dial(ctx, v.transport, network, port)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return pod
}

// dialFrom connects from inside a pod's namespace.
func dialFrom(pod *podns.Namespaces, network, address string) (conn *net.TCPConn, err error) {
	err = pod.Do(context.Background(), func() error {
		c, err := net.DialTimeout(network, address, patience)
		if err == nil {
			conn = c.(*net.TCPConn)
			conn.SetDeadline(time.Now().Add(patience))
		}
		return err
	})
	return conn, err
}

// echoes sends data over c and expects it back, then the end.
func echoes(c halfCloser, data []byte) error {
	go func() {
		c.Write(data)
		c.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, data) {
		return fmt.Errorf("%d bytes came back of %d, or others", len(got), len(data))
	}
	return nil
}

// dials is what a host must reach on the guest's loopback.
func dials(t *testing.T, v *virtual) {
	t.Run("Dial", func(t *testing.T) {
		reports := serveLoopback(t, v)
		pod := forwarded(t, v)
		t.Run("Direct", func(t *testing.T) { dialDirect(t, v) })
		t.Run("PortForward", func(t *testing.T) { dialForwarded(t, pod) })
		t.Run("Ends", func(t *testing.T) { dialEnds(t, pod, reports) })
	})
}

func dialDirect(t *testing.T, v *virtual) {
	for _, tc := range []struct {
		network string
		port    uint16
		refused bool
	}{
		{"tcp4", port4, false},
		{"tcp6", port6, false},
		{"tcp4", port6, true},
		{"tcp6", port4, true},
		{"tcp4", portNone, true},
		{"tcp6", portNone, true},
	} {
		c, err := guestdial.Dial(testContext(t), v.transport, tc.network, tc.port)
		if tc.refused {
			if !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("Dial(%s, %d) = %v; want refused", tc.network, tc.port, err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(patience))
		if err := echoes(c, noise(1<<20)); err != nil {
			t.Errorf("echo over %s: %v", tc.network, err)
		}
		c.Close()
	}
}

// dialEnds has clients end in both ways, which the server tells apart.
func dialEnds(t *testing.T, pod *podns.Namespaces, reports *bufio.Reader) {
	for _, want := range []string{"end", "reset", "end"} {
		c, err := dialFrom(pod, "tcp4", fmt.Sprintf("127.0.0.1:%d", portReport))
		if err != nil {
			t.Fatal(err)
		}
		c.Write(noise(100 << 10))
		if want == "reset" {
			c.SetLinger(0)
		}
		c.Close()
		if got, err := reports.ReadString('\n'); got != want+"\n" {
			t.Errorf("the server says %q, %v of a client's %s; want %q", got, err, want, want)
		}
	}
}

func dialForwarded(t *testing.T, pod *podns.Namespaces) {
	for _, tc := range []struct {
		network, host string
		port, size    int
	}{
		{"tcp4", "127.0.0.1", port4, 8 << 20},
		{"tcp4", "localhost", port4, 1},
		{"tcp4", "127.9.9.9", port4, 100},
		{"tcp4", "127.0.0.1", port6, 100}, // the server has ::1 alone
		{"tcp6", "::1", port6, 8 << 20},
	} {
		c, err := dialFrom(pod, tc.network, net.JoinHostPort(tc.host, fmt.Sprint(tc.port)))
		if err == nil {
			begin := time.Now()
			err = echoes(c, noise(tc.size))
			c.Close()
			t.Logf("%d bytes each way by %s in %v", tc.size, tc.host, time.Since(begin))
		}
		if err != nil {
			t.Errorf("%d bytes by %s port %d: %v", tc.size, tc.host, tc.port, err)
		}
	}
	for _, tc := range []struct {
		what, network, host string
		port                int
	}{
		{"a reset by the server", "tcp4", "127.0.0.1", portReset},
		{"a refusal of IPv4", "tcp4", "127.0.0.1", portNone},
		{"a refusal of IPv6", "tcp6", "::1", portNone},
	} {
		c, err := dialFrom(pod, tc.network, net.JoinHostPort(tc.host, fmt.Sprint(tc.port)))
		if err == nil {
			c.Write([]byte("x"))
			_, err = io.ReadAll(c)
			c.Close()
		}
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s is %v to the client; want a reset", tc.what, err)
		}
	}
	const conns = 100
	var wg sync.WaitGroup
	for i := range conns {
		wg.Go(func() {
			c, err := dialFrom(pod, "tcp4", fmt.Sprintf("127.0.0.1:%d", port4))
			if err == nil {
				err = echoes(c, noise(i*100))
				c.Close()
			}
			if err != nil {
				t.Errorf("connection %d of %d: %v", i, conns, err)
			}
		})
	}
	wg.Wait()
}

// BenchmarkVMDial measures until the first byte has come back over a new
// connection: by the pod's loopback and by vsock alone.
func BenchmarkVMDial(b *testing.B) {
	v := bootVM(b, vmSpec{kind: guest.Tuned, programs: loopbackPrograms(b)})
	serveLoopback(b, v)
	pod := forwarded(b, v)
	for _, bm := range []struct {
		name string
		dial func() (net.Conn, error)
	}{
		{"portforward", func() (net.Conn, error) { return dialFrom(pod, "tcp4", fmt.Sprintf("127.0.0.1:%d", port4)) }},
		{"vsock", func() (net.Conn, error) { return guestdial.Dial(context.Background(), v.transport, "tcp4", port4) }},
	} {
		b.Run(bm.name, func(b *testing.B) {
			for b.Loop() {
				c, err := bm.dial()
				if err != nil {
					b.Fatal(err)
				}
				c.Write([]byte("x"))
				if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
					b.Fatal(err)
				}
				c.Close()
			}
		})
	}
}
