package vsock

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/vhostuser/vsock"
)

// Every guest has its own device in its own VMM, so all can have the same
// addresses.
const (
	vhostUserCID  = 3
	vhostUserPort = 1024
)

// vhostUser is a device served by this process.
type vhostUser struct {
	device   *vsock.Device
	listener *vsock.Listener
	backend  *os.File // the VMM's end of the socket
	served   sync.WaitGroup
}

func openVhostUser() (Transport, error) {
	t := &vhostUser{}
	var err error
	if t.device, err = vsock.New(vsock.Config{GuestCID: vhostUserCID}); err != nil {
		return nil, err
	}
	if t.listener, err = t.device.Listen(vhostUserPort); err != nil {
		return nil, err
	}
	conn, backend, err := socketpair()
	if err != nil {
		return nil, fmt.Errorf("open vhost-user vsock: %w", err)
	}
	t.backend = backend
	// The device tells everybody who uses it why it has ended.
	t.served.Go(func() { _ = t.device.Serve(context.Background(), conn) })
	return t, nil
}

// socketpair returns a connected pair: one end to serve, one to hand over.
func socketpair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "vhost-user"), os.NewFile(uintptr(fds[1]), "vhost-user front end")
	defer ours.Close() // FileConn has a copy
	conn, err := net.FileConn(ours)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return conn.(*net.UnixConn), theirs, nil
}

func (t *vhostUser) Name() string     { return VhostUser }
func (t *vhostUser) CID() uint32      { return vhostUserCID }
func (t *vhostUser) HostPort() uint32 { return vhostUserPort }

func (t *vhostUser) Device() hypervisor.Vsock {
	return hypervisor.Vsock{CID: vhostUserCID, Backend: t.backend}
}

func (t *vhostUser) Dial(ctx context.Context, port uint32) (Conn, error) {
	c, err := t.device.Dial(ctx, port)
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (t *vhostUser) Accept(ctx context.Context) (Conn, error) {
	c, err := t.listener.AcceptContext(ctx)
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (t *vhostUser) Close() error {
	err := t.device.Close()
	if cerr := t.backend.Close(); cerr != nil && !errors.Is(cerr, os.ErrClosed) {
		err = errors.Join(err, cerr)
	}
	t.served.Wait()
	return err
}
