package vsock

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
	"unsafe"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/accept"
	"github.com/vmrt/vmrt/pkg/hypervisor"
)

const vhostDevice = "/dev/vhost-vsock"

// vhostSetGuestCID is VHOST_VSOCK_SET_GUEST_CID, _IOW(0xAF, 0x60, __u64)
// (include/uapi/linux/vhost.h).
const vhostSetGuestCID = 0x4008af60

// vhost is a device of the host's kernel.
type vhost struct {
	cid      uint32
	file     *os.File
	listener *vsock.Listener
	accepted chan *vsock.Conn
	closing  chan struct{}
	once     sync.Once
	serving  sync.WaitGroup
	err      error // why accept has ended; set before accepted is closed

	mu    sync.Mutex
	conns map[*vhostConn]struct{} // nil once closed
}

// vhostConn is a connection that ends with its transport.
type vhostConn struct {
	*vsock.Conn
	t *vhost
}

// Close implements net.Conn.
func (c *vhostConn) Close() error {
	c.t.mu.Lock()
	delete(c.t.conns, c)
	c.t.mu.Unlock()
	return c.Conn.Close()
}

// track makes c end with the transport.
func (t *vhost) track(c *vsock.Conn) (Conn, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.conns == nil {
		c.Close()
		return nil, net.ErrClosed
	}
	v := &vhostConn{Conn: c, t: t}
	t.conns[v] = struct{}{}
	return v, nil
}

func openVhost() (Transport, error) {
	file, err := os.OpenFile(vhostDevice, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open vhost vsock: %w", err)
	}
	cid, err := claimCID(func(cid uint64) error { return setGuestCID(file, cid) })
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("open vhost vsock: %w", err)
	}
	// Bound to the host's own CID, the port is out of reach for a machine
	// that this host is a guest of.
	listener, err := vsock.ListenContextID(vsock.Host, 0, nil)
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("open vhost vsock: %w", err)
	}
	t := &vhost{
		cid: cid, file: file, listener: listener,
		accepted: make(chan *vsock.Conn),
		closing:  make(chan struct{}),
		conns:    make(map[*vhostConn]struct{}),
	}
	t.serving.Go(t.accept)
	return t, nil
}

func setGuestCID(file *os.File, cid uint64) error {
	conn, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var errno unix.Errno
	err = conn.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, vhostSetGuestCID, uintptr(unsafe.Pointer(&cid)))
	})
	if err == nil && errno != 0 {
		err = errno
	}
	return err
}

// claimCID finds a CID that no other guest of this host has. The kernel keeps
// the table: set fails with EADDRINUSE for a CID that is taken. Random ones
// among 2^32 collide rarely, and are not soon used again.
func claimCID(set func(cid uint64) error) (uint32, error) {
	var err error
	for range 16 {
		var b [4]byte
		rand.Read(b[:])
		cid := binary.NativeEndian.Uint32(b[:])
		if cid < 3 || cid == 1<<32-1 {
			continue
		}
		if err = set(uint64(cid)); err == nil {
			return cid, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			break
		}
	}
	return 0, fmt.Errorf("set guest CID: %w", err)
}

// accept hands over the guest's connections until the listener is closed.
// Connections of other guests, which can reach the port too, are closed.
func (t *vhost) accept() {
	defer close(t.accepted)
	for {
		c, err := accept.Next(t.listener)
		if err != nil {
			t.err = err
			return
		}
		if peer := c.RemoteAddr().(*vsock.Addr); peer.ContextID != t.cid {
			c.Close()
			continue
		}
		select {
		case t.accepted <- c.(*vsock.Conn):
		case <-t.closing:
			c.Close()
		}
	}
}

func (t *vhost) Name() string     { return Vhost }
func (t *vhost) CID() uint32      { return t.cid }
func (t *vhost) HostPort() uint32 { return t.listener.Addr().(*vsock.Addr).Port }

func (t *vhost) Device() hypervisor.Vsock {
	return hypervisor.Vsock{CID: t.cid, VhostFD: t.file}
}

func (t *vhost) Accept(ctx context.Context) (Conn, error) {
	select {
	case c, ok := <-t.accepted:
		if !ok {
			return nil, t.err
		}
		return t.track(c)
	case <-ctx.Done():
		return nil, fmt.Errorf("accept vsock vm(%d): %w", t.cid, ctx.Err())
	}
}

// notReadyPause is between attempts to reach a guest whose driver is not ready
// on a kernel that refuses at once. Nothing announces that it is.
const notReadyPause = 20 * time.Millisecond

func (t *vhost) Dial(ctx context.Context, port uint32) (Conn, error) {
	// Close ends dials as well.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-t.closing:
			cancel(net.ErrClosed)
		case <-stop:
		}
	}()
	for {
		c, err := vsock.DialContext(ctx, t.cid, port, nil)
		if err == nil {
			return t.track(c)
		}
		if ctx.Err() == nil {
			if !notReady(err) {
				return nil, refused(err)
			}
			wait(ctx, err)
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("dial vsock vm(%d):%d: %w", t.cid, port, context.Cause(ctx))
		}
	}
}

// notReady reports whether a dial failed because the guest's driver does not
// take packets yet. Linux gives up after two seconds (net/vmw_vsock/af_vsock.c,
// VSOCK_DEFAULT_CONNECT_TIMEOUT), or refuses at once where it notices. A guest
// that refuses is another error, ECONNRESET.
func notReady(err error) bool {
	return errors.Is(err, unix.ETIMEDOUT) || errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.EHOSTUNREACH)
}

// wait pauses after an attempt that did not take its time itself.
func wait(ctx context.Context, err error) {
	if errors.Is(err, unix.ETIMEDOUT) {
		return
	}
	pause := time.NewTimer(notReadyPause)
	defer pause.Stop()
	select {
	case <-pause.C:
	case <-ctx.Done():
	}
}

// refused gives a guest's reset of a connection that does not exist yet the
// name that it has in other protocols.
func refused(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && errors.Is(op.Err, unix.ECONNRESET) {
		refusal := *op
		refusal.Err = unix.ECONNREFUSED
		return &refusal
	}
	return err
}

func (t *vhost) Close() error {
	var err error
	t.once.Do(func() {
		close(t.closing)
		err = t.listener.Close()
		if cerr := t.file.Close(); cerr != nil && !errors.Is(cerr, os.ErrClosed) {
			err = errors.Join(err, cerr)
		}
		t.mu.Lock()
		conns := t.conns
		t.conns = nil
		t.mu.Unlock()
		for c := range conns {
			c.Conn.Close()
		}
	})
	t.serving.Wait()
	return err
}
