//go:build linux

// Package probe is what tests run at both ends of a network: servers that echo
// and digest, and clients that check and measure. The same code runs in a
// network namespace of the host; served by net/rpc over vsock in a container of
// a virtual machine; and as a program (tests/env/image/program/probe) in the
// containers of any runtime.
package probe

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Port is the vsock port of the guest's probe.
const Port = 4000

// patience bounds every exchange.
const patience = 60 * time.Second

// The first byte of a TCP connection says what the server is to do.
const (
	echo   = 'e' // send back what comes
	digest = 'd' // take all, then answer with its SHA-256
	count  = 'c' // take all, then answer with its length
)

// Probe is one end. Its methods have the form that net/rpc wants.
type Probe struct {
	// Inside runs f where sockets are to be made. Nil: right here.
	Inside func(f func() error) error

	mu      sync.Mutex
	servers []io.Closer // guarded by mu
}

// Close ends the servers.
func (p *Probe) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.servers {
		s.Close()
	}
	p.servers = nil
}

func (p *Probe) inside(f func() error) error {
	if p.Inside == nil {
		return f()
	}
	return p.Inside(f)
}

// Run runs a program and returns its output.
func (p *Probe) Run(args []string, out *string) error {
	b, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	*out = string(b)
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, b)
	}
	return nil
}

// Serve serves TCP and UDP on an address until Close.
func (p *Probe) Serve(addr string, _ *struct{}) error {
	return p.inside(func() error {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return err
		}
		u, err := net.ListenPacket("udp", addr)
		if err != nil {
			l.Close()
			return err
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.servers = append(p.servers, l, u)
		go serveTCP(l)
		go serveUDP(u)
		return nil
	})
}

func serveTCP(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			var verb [1]byte
			if _, err := io.ReadFull(c, verb[:]); err != nil {
				return
			}
			switch verb[0] {
			case echo:
				_, _ = io.Copy(onlyWriter{c}, c) // the client notices
			case count:
				n, _ := io.CopyBuffer(onlyWriter{io.Discard}, c, make([]byte, 256<<10))
				_, _ = c.Write(binary.BigEndian.AppendUint64(nil, uint64(n)))
			case digest:
				h := sha256.New()
				if _, err := io.CopyBuffer(onlyWriter{h}, c, make([]byte, 256<<10)); err == nil {
					_, _ = c.Write(h.Sum(nil))
				}
			}
		}()
	}
}

// onlyWriter keeps io.Copy from splice(2): what is measured is a program that
// reads and writes.
type onlyWriter struct{ io.Writer }

func serveUDP(u net.PacketConn) {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := u.ReadFrom(buf)
		if err != nil {
			return
		}
		_, _ = u.WriteTo(buf[:n], from)
	}
}

func (p *Probe) dial(network, addr string) (c net.Conn, err error) {
	err = p.inside(func() error {
		c, err = net.DialTimeout(network, addr, patience)
		return err
	})
	if err == nil {
		err = c.SetDeadline(time.Now().Add(patience))
	}
	return c, err
}

// Transfer is a request to send bytes to a server of TCP.
type Transfer struct {
	Addr  string
	Bytes int64
}

// Send sends random bytes by TCP, checks that the same have arrived, and
// returns how long it took.
func (p *Probe) Send(t Transfer, took *time.Duration) error {
	c, err := p.dial("tcp", t.Addr)
	if err != nil {
		return err
	}
	defer c.Close()
	// One block of random bytes again and again, each time changed a little:
	// making all of it would take longer than sending it.
	block := make([]byte, 256<<10)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(block)
	h := sha256.New()
	begin := time.Now()
	if _, err := c.Write([]byte{digest}); err != nil {
		return err
	}
	for left := t.Bytes; left > 0; left -= int64(len(block)) {
		block = block[:min(left, int64(len(block)))]
		block[0]++
		h.Write(block)
		if _, err := c.Write(block); err != nil {
			return fmt.Errorf("after %d bytes: %w", t.Bytes-left, err)
		}
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	got, err := io.ReadAll(c)
	if err != nil {
		return err
	}
	*took = time.Since(begin)
	if !bytes.Equal(got, h.Sum(nil)) {
		return fmt.Errorf("%d bytes to %s: digest %x; want %x", t.Bytes, t.Addr, got, h.Sum(nil))
	}
	return nil
}

// Fill sends zeros by TCP and checks that as many have arrived. It is for
// measuring: a digest would take longer than the way.
func (p *Probe) Fill(t Transfer, _ *struct{}) error {
	c, err := p.dial("tcp", t.Addr)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write([]byte{count}); err != nil {
		return err
	}
	block := make([]byte, 256<<10)
	for left := t.Bytes; left > 0; left -= int64(len(block)) {
		if _, err := c.Write(block[:min(left, int64(len(block)))]); err != nil {
			return err
		}
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	var got [8]byte
	if _, err := io.ReadFull(c, got[:]); err != nil {
		return err
	}
	if n := binary.BigEndian.Uint64(got[:]); n != uint64(t.Bytes) {
		return fmt.Errorf("%d bytes have arrived of %d", n, t.Bytes)
	}
	return nil
}

// Exchange is a request for round trips.
type Exchange struct {
	Network, Addr string // "tcp" or "udp"
	Size, Count   int
	// Whole forbids fragments (IP_MTU_DISCOVER, IPv4 UDP).
	Whole bool
}

// RoundTrips sends messages, checks that each comes back as it was, and returns
// the median of the times. UDP tries each a few times.
func (p *Probe) RoundTrips(x Exchange, median *time.Duration) error {
	c, err := p.dial(x.Network, x.Addr)
	if err != nil {
		return err
	}
	defer c.Close()
	attempts := 1
	if x.Network == "udp" {
		attempts = 5
		if err := prepareUDP(c.(*net.UDPConn), x.Whole); err != nil {
			return err
		}
	} else if _, err := c.Write([]byte{echo}); err != nil {
		return err
	}
	message, answer := make([]byte, x.Size), make([]byte, x.Size+1)
	rng := rand.NewChaCha8([32]byte{2})
	var times []time.Duration
	for range x.Count {
		_, _ = rng.Read(message)
		took, err := roundTrip(c, message, answer, attempts)
		if err != nil {
			return fmt.Errorf("%s %s, %d bytes: %w", x.Network, x.Addr, x.Size, err)
		}
		times = append(times, took)
	}
	slices.Sort(times)
	*median = times[len(times)/2]
	return nil
}

// prepareUDP gives the socket buffers for the largest messages.
func prepareUDP(c *net.UDPConn, whole bool) error {
	if err := errors.Join(c.SetReadBuffer(1<<20), c.SetWriteBuffer(1<<20)); err != nil || !whole {
		return err
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = raw.Control(func(fd uintptr) {
		set = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	})
	return errors.Join(err, set)
}

func roundTrip(c net.Conn, message, answer []byte, attempts int) (time.Duration, error) {
	for attempt := 1; ; attempt++ {
		begin := time.Now()
		if _, err := c.Write(message); err != nil {
			return 0, err
		}
		err := awaitAnswer(c, message, answer, attempts > 1)
		if err == nil {
			return time.Since(begin), nil
		}
		// A datagram may be lost, but not for ever.
		if attempt == attempts || !errors.Is(err, syscall.ETIMEDOUT) {
			return 0, err
		}
	}
}

func awaitAnswer(c net.Conn, message, answer []byte, datagram bool) error {
	if !datagram {
		if _, err := io.ReadFull(c, answer[:len(message)]); err != nil {
			return err
		}
		if !bytes.Equal(message, answer[:len(message)]) {
			return errors.New("the answer differs")
		}
		return nil
	}
	if err := c.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return err
	}
	for {
		n, err := c.Read(answer)
		var timeout net.Error
		switch {
		case errors.As(err, &timeout) && timeout.Timeout():
			return fmt.Errorf("no answer: %w", syscall.ETIMEDOUT)
		case err != nil:
			return err
		case bytes.Equal(message, answer[:n]):
			return nil
		}
		// The answer to an earlier attempt.
	}
}
