//go:build linux

package portforward_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/podns/podnstest"
	"github.com/vmrt/vmrt/pkg/portforward"
	"github.com/vmrt/vmrt/pkg/relay"
)

func TestMain(m *testing.M) {
	podnstest.Main(m, helpers)
}

// patience bounds what a test waits for; nothing waits that long when it works.
const patience = 20 * time.Second

func TestAddresses(t *testing.T) {
	g := newGuest()
	for _, port := range []int{1, 80, 8080, 65535} {
		g.listen(fmt.Sprintf("127.0.0.1:%d", port), say(fmt.Sprintf("v4 %d", port)))
		g.listen(fmt.Sprintf("[::1]:%d", port), say(fmt.Sprintf("v6 %d", port)))
	}
	g.listen("[::1]:7000", say("only v6"))
	pod, _ := start(t, g.dial)
	for _, tc := range []struct{ network, address, want string }{
		{"tcp4", "127.0.0.1:80", "v4 80"},
		{"tcp4", "127.0.0.1:1", "v4 1"},
		{"tcp4", "127.0.0.1:65535", "v4 65535"},
		{"tcp4", "127.5.5.5:8080", "v4 8080"},
		{"tcp4", "127.255.255.254:8080", "v4 8080"},
		{"tcp6", "[::1]:80", "v6 80"},
		{"tcp6", "[::1]:65535", "v6 65535"},
		{"tcp6", "[::1]:7000", "only v6"},
		{"tcp4", "127.0.0.1:7000", "only v6"},
		{"tcp4", "localhost:8080", "v4 8080"}, // containerd's words
	} {
		t.Run(tc.network+" "+tc.address, func(t *testing.T) {
			c := dial(t, pod, tc.network, tc.address)
			if got, err := io.ReadAll(c); string(got) != tc.want || err != nil {
				t.Errorf("read from %s = %q, %v; want %q", tc.address, got, err, tc.want)
			}
		})
	}
}

// What asks for ::1 gets no server of 127.0.0.1; what asks for 127/8 asks
// there first.
func TestOrderOfFamilies(t *testing.T) {
	g := newGuest()
	g.listen("127.0.0.1:80", echo)
	pod, _ := start(t, g.dial)
	for _, tc := range []struct {
		network, address string
		want             []string
	}{
		{"tcp4", "127.0.0.1:80", []string{"tcp4 80"}},
		{"tcp4", "127.0.0.1:81", []string{"tcp4 81", "tcp6 81"}},
		{"tcp6", "[::1]:80", []string{"tcp6 80"}},
	} {
		before := len(g.dialled())
		if c, err := tryDial(pod, tc.network, tc.address); err == nil {
			c.CloseWrite()
			io.ReadAll(c)
			c.Close()
		}
		if diff := cmp.Diff(tc.want, g.dialled()[before:]); diff != "" {
			t.Errorf("the guest's dials for %s (-want +got):\n%s", tc.address, diff)
		}
	}
}

// readByte dials and reads one byte.
func readByte(pod *podns.Namespaces, network, address string) error {
	c, err := tryDial(pod, network, address)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = io.ReadFull(c, make([]byte, 1))
	return err
}

func TestRefused(t *testing.T) {
	pod, _ := start(t, newGuest().dial)
	for _, tc := range []struct{ network, address string }{{"tcp4", "127.0.0.1:80"}, {"tcp6", "[::1]:80"}} {
		if err := readByte(pod, tc.network, tc.address); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("dial of and read from %s, refused by the guest = %v; want a reset", tc.address, err)
		}
	}
}

func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

func TestLargeTransfers(t *testing.T) {
	const size = 32 << 20
	up, down := noise(1, size), noise(2, size)
	got := make(chan [32]byte, 1)
	g := newGuest()
	g.listen("127.0.0.1:80", func(c relay.Conn) {
		var wg sync.WaitGroup
		wg.Go(func() {
			c.Write(down)
			c.CloseWrite()
		})
		sum := sha256.New()
		io.Copy(sum, c)
		got <- [32]byte(sum.Sum(nil))
		wg.Wait()
		c.Close()
	})
	pod, _ := start(t, g.dial)
	c := dial(t, pod, "tcp4", "127.0.0.1:80")
	go func() {
		c.Write(up)
		c.CloseWrite()
	}()
	begin := time.Now()
	sum := sha256.New()
	n, err := io.Copy(sum, c)
	if err != nil || n != size || [32]byte(sum.Sum(nil)) != sha256.Sum256(down) {
		t.Errorf("received %d bytes, %v; want the %d that the server sent", n, err, size)
	}
	if <-got != sha256.Sum256(up) {
		t.Errorf("the server received something else than was sent")
	}
	t.Logf("%d MiB each way in %v", size>>20, time.Since(begin))
}

func TestHalfClose(t *testing.T) {
	for _, tc := range []struct{ name, network, address string }{{"IPv4", "tcp4", "127.0.0.1:80"}, {"IPv6", "tcp6", "[::1]:80"}} {
		t.Run(tc.name, func(t *testing.T) {
			g := newGuest()
			serve := func(c relay.Conn) {
				defer c.Close()
				b, _ := io.ReadAll(c) // the answer follows the end of the question
				fmt.Fprintf(c, "%d: %s", len(b), bytes.ToUpper(b))
			}
			g.listen("127.0.0.1:80", serve)
			g.listen("[::1]:80", serve)
			pod, _ := start(t, g.dial)
			c := dial(t, pod, tc.network, tc.address)
			io.WriteString(c, "question")
			c.CloseWrite()
			if got, err := io.ReadAll(c); string(got) != "8: QUESTION" || err != nil {
				t.Errorf("answer = %q, %v; want %q", got, err, "8: QUESTION")
			}
		})
	}
}

func TestServerEndsFirst(t *testing.T) {
	received := make(chan string, 1)
	g := newGuest()
	g.listen("127.0.0.1:80", func(c relay.Conn) {
		io.WriteString(c, "bye")
		c.CloseWrite()
		b, _ := io.ReadAll(c)
		received <- string(b)
		c.Close()
	})
	pod, _ := start(t, g.dial)
	c := dial(t, pod, "tcp4", "127.0.0.1:80")
	if got, err := io.ReadAll(c); string(got) != "bye" || err != nil {
		t.Fatalf("read = %q, %v; want %q", got, err, "bye")
	}
	io.WriteString(c, "and more")
	c.Close()
	if got := <-received; got != "and more" {
		t.Errorf("the server received %q after its own end; want %q", got, "and more")
	}
}

func TestResets(t *testing.T) {
	for _, tc := range []struct {
		name string
		pair func() (a, b relay.Conn, err error)
	}{{"tcp", tcpPair}, {"unix", unixPair}} {
		t.Run("by the server over "+tc.name, func(t *testing.T) {
			g := newGuest()
			g.pair = tc.pair
			g.listen("127.0.0.1:80", func(c relay.Conn) {
				io.ReadFull(c, make([]byte, 1))
				relay.Abort(c)
			})
			pod, _ := start(t, g.dial)
			c := dial(t, pod, "tcp4", "127.0.0.1:80")
			io.WriteString(c, "x")
			if _, err := io.ReadAll(c); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("read = %v; want a reset", err)
			}
		})
	}
	t.Run("by the client", func(t *testing.T) {
		result := make(chan error, 1)
		g := newGuest()
		g.listen("127.0.0.1:80", func(c relay.Conn) {
			_, err := io.ReadAll(c)
			result <- err
			c.Close()
		})
		pod, _ := start(t, g.dial)
		relay.Abort(dial(t, pod, "tcp4", "127.0.0.1:80"))
		if err := <-result; !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("the server's read = %v; want a reset", err)
		}
	})
}

func TestParallel(t *testing.T) {
	const conns, size = 200, 100 << 10
	g := newGuest()
	for i := range conns {
		g.listen(fmt.Sprintf("127.0.0.1:%d", 1000+i), echo)
	}
	pod, _ := start(t, g.dial)
	all := make([]*net.TCPConn, conns)
	for i := range all { // all of them are open at once
		all[i] = dial(t, pod, "tcp4", fmt.Sprintf("127.0.0.1:%d", 1000+i))
	}
	var wg sync.WaitGroup
	for i, c := range all {
		data := noise(byte(i), size)
		wg.Go(func() {
			c.Write(data)
			c.CloseWrite()
		})
		wg.Go(func() {
			if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, data) {
				t.Errorf("connection %d: %d bytes came back, %v; want the %d sent", i, len(got), err, size)
			}
		})
	}
	wg.Wait()
}

// Above the limit connections are reset; the others go on.
func TestTooMany(t *testing.T) {
	g := newGuest()
	g.listen("127.0.0.1:80", echo)
	pod, _ := start(t, g.dial)
	ping := func(c net.Conn) error {
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		_, err := io.ReadFull(c, make([]byte, 1))
		return err
	}
	var first net.Conn
	for i := range portforward.MaxConns {
		c := dial(t, pod, "tcp4", "127.0.0.1:80")
		if err := ping(c); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		if i == 0 {
			first = c
		}
	}
	if err := readByte(pod, "tcp4", "127.0.0.1:80"); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("dial of and read from a connection above the limit = %v; want a reset", err)
	}
	if err := ping(first); err != nil {
		t.Errorf("an open connection beside it: %v", err)
	}
	first.Close()
	podnstest.Wait(t, "room for a connection", func() bool {
		c, err := tryDial(pod, "tcp4", "127.0.0.1:80")
		if err != nil {
			return false // reset already
		}
		defer c.Close()
		return ping(c) == nil
	})
}

// Linux hands a client its connection before the guest has agreed: what it
// sends meanwhile waits.
func TestGuestTakesItsTime(t *testing.T) {
	g, answer := newGuest(), make(chan struct{})
	g.listen("127.0.0.1:80", echo)
	pod, _ := start(t, func(ctx context.Context, network string, port uint16) (portforward.Conn, error) {
		<-answer
		return g.dial(ctx, network, port)
	})
	c := dial(t, pod, "tcp4", "127.0.0.1:80")
	io.WriteString(c, "early")
	c.CloseWrite()
	close(answer)
	if got, err := io.ReadAll(c); string(got) != "early" || err != nil {
		t.Errorf("read = %q, %v; want %q", got, err, "early")
	}
}

// BenchmarkDial measures a whole connection that the server greets and closes,
// beside one to a server that listens in the namespace itself.
func BenchmarkDial(b *testing.B) {
	g := newGuest()
	g.pair = unixPair
	g.listen("127.0.0.1:80", func(c relay.Conn) { // as the agent ends a connection
		io.WriteString(c, "x")
		c.CloseWrite()
		io.Copy(io.Discard, c)
		c.Close()
	})
	pod := podnstest.Open(b, podns.Config{})
	l := listenIn(b, pod, "127.0.0.1:81")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			say("x")(c.(*net.TCPConn))
		}
	}()
	startIn(b, pod, g.dial)
	for _, bm := range []struct{ name, address string }{{"forwarded", "127.0.0.1:80"}, {"direct", "127.0.0.1:81"}} {
		b.Run(bm.name, func(b *testing.B) {
			for b.Loop() {
				c, err := tryDial(pod, "tcp4", bm.address)
				if err != nil {
					b.Fatal(err)
				}
				if got, err := io.ReadAll(c); string(got) != "x" || err != nil {
					b.Fatalf("read = %q, %v", got, err)
				}
				c.Close()
			}
		})
	}
}

// BenchmarkStart is what a pod's start pays.
func BenchmarkStart(b *testing.B) {
	pod := podnstest.Open(b, podns.Config{})
	for b.Loop() {
		f, err := portforward.Start(b.Context(), pod, newGuest().dial)
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		f.Close()
		b.StartTimer()
	}
}
