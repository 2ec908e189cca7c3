//go:build linux

package dial

import (
	"context"
	"net"
	"net/netip"
	"time"

	"github.com/vmrt/vmrt/api"
)

// Request has the other side's Server connect to an address, by api.TCP or
// api.UDP. Whatever ends ctx ends the wait. After an error conn is of no use; it stays the caller's. The
// error is syscall.ECONNREFUSED if nobody listens there.
func Request(ctx context.Context, conn net.Conn, network string, to netip.AddrPort) error {
	expired := time.Unix(1, 0)
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		conn.SetDeadline(expired)
		close(interrupted)
	})
	err := api.WriteDialRequest(conn, network, to)
	if err == nil {
		err = api.ReadDialAnswer(conn)
	}
	if !stop() {
		<-interrupted // the deadline is not the connection's from here on
		if err == nil {
			err = context.Cause(ctx)
		}
	}
	return err
}
