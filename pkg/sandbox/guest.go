package sandbox

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/vsock"
)

// VMMs run under a user id of their own each, so that one that a guest has
// taken over can neither signal nor trace another. The range is one that
// systemd documents as free for such use (UIDS-GIDS.md, 1879048192 and up).
const (
	uidBase  = 0x70000000
	uidCount = 0x0ff00000
)

// credential returns the VMM's user for a sandbox: the same at every call, and
// different for different sandboxes but for a hash collision.
func credential(namespace, id string) *syscall.Credential {
	h := sha256.Sum256([]byte(namespace + "/" + id))
	uid := uidBase + binary.BigEndian.Uint32(h[:4])%uidCount
	return &syscall.Credential{Uid: uid, Gid: uid}
}

// printable makes guest text fit for a log or an error.
func printable(s string, max int) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r > '~' {
			return '?'
		}
		return r
	}, s)
	if len(s) > max {
		s = s[:max] + "…"
	}
	return s
}

// streamTimeout bounds the set-up of one stream connection.
const streamTimeout = 10 * time.Second

// OpenStream makes a stream connection with this name; a request that follows
// may name it (see package api).
func (s *Sandbox) OpenStream(ctx context.Context, name string) (_ vsock.Conn, err error) {
	ctx, cancel := context.WithTimeout(ctx, streamTimeout)
	defer cancel()
	defer func() {
		if err != nil {
			err = fmt.Errorf("open stream %s: %w", name, err)
		}
	}()
	conn, err := s.transport.Dial(ctx, api.PortStream)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return nil, err
		}
	}
	if err := api.WriteStreamHeader(conn, name); err != nil {
		return nil, err
	}
	var ack [1]byte
	if _, err := io.ReadFull(conn, ack[:]); err != nil {
		return nil, err
	}
	if ack[0] != api.StreamAck {
		return nil, fmt.Errorf("agent answered %#x", ack[0])
	}
	return conn, conn.SetDeadline(time.Time{})
}

// Resize brings CPUs of the guest online or takes them offline until cpus are.
// What the virtual machine was not made with it cannot get: more of either is
// an error of kind errdefs.ErrFailedPrecondition. Memory is not taken away.
func (s *Sandbox) Resize(ctx context.Context, memoryMiB, cpus int) error {
	if memoryMiB > s.cfg.MemoryMiB {
		return fmt.Errorf("virtual machine was started with %d MiB and cannot grow to %d: %w", s.cfg.MemoryMiB, memoryMiB, errdefs.ErrFailedPrecondition)
	}
	if cpus > s.cfg.CPUs {
		return fmt.Errorf("virtual machine was started with %d CPUs and cannot get %d: %w", s.cfg.CPUs, cpus, errdefs.ErrFailedPrecondition)
	}
	_, err := s.Agent().OnlineCPUs(ctx, &api.OnlineCPUsRequest{Count: uint32(cpus)})
	return wrap(fmt.Sprintf("set the guest's CPUs to %d", cpus), err)
}

// Events calls handle with each event of the guest's task service, once and in
// order, until the sandbox is dead. handle must not wait for the guest.
func (s *Sandbox) Events(ctx context.Context, handle func(*api.Event)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for last := uint64(0); ; {
		before := last
		err := s.takeEvents(ctx, &last, handle)
		// A host that was too busy to take 64 events within a second has lost
		// the stream (ttrpc: stream.go, receive), not the events: a new stream
		// repeats them.
		if !errors.Is(err, ttrpc.ErrStreamFull) || last == before {
			return err
		}
		log.G(ctx).WithField("sandbox", s.cfg.ID).WithField("event", last).Warn("guest events came faster than they were taken: subscribing again")
	}
}

// takeEvents handles the events of one stream from the one after last on. Those
// before are skipped where the stream begins with them.
func (s *Sandbox) takeEvents(ctx context.Context, last *uint64, handle func(*api.Event)) error {
	stream, err := s.Agent().Events(ctx, &api.Empty{})
	if err != nil {
		return fmt.Errorf("subscribe to guest events: %w", fromGuest(err))
	}
	repeated := *last
	for {
		ev, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return errors.New("guest ended its event stream")
		}
		if err != nil {
			return fmt.Errorf("receive guest event: %w", fromGuest(err))
		}
		seq := ev.GetSeq()
		if *last == repeated && 0 < seq && seq <= repeated {
			continue
		}
		if seq != *last+1 {
			return fmt.Errorf("guest event %d follows %d", seq, *last)
		}
		*last = seq
		handle(ev)
	}
}

// The guest's clock is read at these intervals and stepped when it is off by
// more than clockTolerance. What remains is half of a reading's round trip.
const (
	clockInterval  = 10 * time.Second
	clockTolerance = 5 * time.Millisecond
	clockTimeout   = 5 * time.Second
)

// keepClock holds the guest's clock to the host's until the sandbox is dead.
func (s *Sandbox) keepClock() {
	tick := time.NewTicker(clockInterval)
	defer tick.Stop()
	for {
		if err := s.syncClock(); err != nil {
			log.L.WithError(err).WithField("sandbox", s.cfg.ID).Warn("guest clock not corrected")
		}
		select {
		case <-tick.C:
		case <-s.dead:
			return
		}
	}
}

// syncClock reads the guest's clock and steps it when it is off.
func (s *Sandbox) syncClock() error {
	ctx, cancel := context.WithTimeout(context.Background(), clockTimeout)
	defer cancel()
	offset, uncertainty, err := s.clockOffset(ctx)
	if err != nil {
		return err
	}
	if offset.Abs() <= max(clockTolerance, uncertainty) {
		return nil
	}
	_, err = s.Agent().Clock(ctx, &api.ClockRequest{StepNs: -offset.Nanoseconds()})
	return err
}

// clockOffset returns how far the guest's clock is ahead of the host's: the
// reading with the shortest round trip of a few, which is what the guest's
// answer lay within.
func (s *Sandbox) clockOffset(ctx context.Context) (offset, uncertainty time.Duration, err error) {
	for i := range 3 {
		sent := time.Now()
		resp, err := s.Agent().Clock(ctx, &api.ClockRequest{})
		if err != nil {
			return 0, 0, fmt.Errorf("read guest clock: %w", err)
		}
		half := time.Since(sent) / 2
		if i == 0 || half < uncertainty {
			offset, uncertainty = resp.GetTime().AsTime().Sub(sent.Add(half).Round(0)), half
		}
	}
	return offset, uncertainty, nil
}
